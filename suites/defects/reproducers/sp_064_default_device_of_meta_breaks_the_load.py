"""SP-064: under a default device of meta a broadcast load fails.

    torchrun --standalone --nproc-per-node 2 sp_064_default_device_of_meta_breaks_the_load.py

Rank 0 broadcasts a full state dict into a sharded model inside of the context in which large models
are made, torch.device("meta"). Needs torch alone. Ends with 0 where torch is right, with 1 where
not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(2, 2, bias=False)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
full = {"weight": torch.ones(2, 2)} if rank == 0 else {}
expected = "a row of [1.0, 1.0]"
try:
    with torch.device("meta"):
        set_model_state_dict(
            model,
            full,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
    came = f"a row of {model.weight.to_local()[0].tolist()}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-064 shows" if shows else "SP-064 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
