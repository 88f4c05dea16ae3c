"""SP-038: what comes back is a dict, where an OrderedDict with _metadata went in.

    torchrun --standalone --nproc-per-node 1 sp_038_metadata_of_the_state_dict_is_lost.py

state_dict() is an OrderedDict with the versions of the modules, which load_state_dict() reads. A
full state dict is taken. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.BatchNorm1d(2)
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = f"{type(model.state_dict()).__name__} of {model.state_dict()._metadata['']}"
came = f"{type(full).__name__} of {getattr(full, '_metadata', {}).get('', 'no version')}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-038 shows" if shows else "SP-038 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
