"""SP-062: keys that the target lacks end in a KeyError or are added.

    torchrun --standalone --nproc-per-node 2 sp_062_key_that_the_model_lacks_is_a_key_error.py

Rank 0 broadcasts a state dict with a key more than the model, with strict=False and cpu_offload.
Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

full = {"old.weight": torch.zeros(2), "weight": torch.ones(3, 3)}
model = torch.nn.Linear(3, 3, bias=False)
expected = "the weight is loaded, the other key is left out"
try:
    set_model_state_dict(
        model,
        full if rank == 0 else {},
        options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True, strict=False
        ),
    )
    came = expected if bool(model.weight.eq(1).all()) else f"a weight of {model.weight.tolist()}"
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-062 shows" if shows else "SP-062 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
