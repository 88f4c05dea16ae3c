"""SP-076: a full, flat optimizer state cannot be loaded.

    torchrun --standalone --nproc-per-node 2 sp_076_flat_optimizer_state_cannot_be_loaded.py

The optimizer state of a sharded model is saved full and flat, and loaded by the same options. Needs
torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(4, 4, bias=False)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
optimizer = torch.optim.Adam(model.parameters())
options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
full = get_optimizer_state_dict(model, optimizer, options=options)
expected = "a load without an error"
try:
    set_optimizer_state_dict(model, optimizer, full, options=options)
    came = expected
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-076 shows" if shows else "SP-076 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
