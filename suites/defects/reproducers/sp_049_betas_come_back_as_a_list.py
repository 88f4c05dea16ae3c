"""SP-049: a flattened state dict leads back to another one: types of containers are lost.

    torchrun --standalone --nproc-per-node 2 sp_049_betas_come_back_as_a_list.py

A full optimizer state of a sharded model is saved and loaded, for which torch flattens and
unflattens it. Adam's betas go in as a tuple. Needs torch alone. Ends with 0 where torch is right,
with 1 where not.
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

model = nn.Linear(4, 4)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
optimizer = torch.optim.Adam(model.parameters())
options = StateDictOptions(full_state_dict=True)
full = get_optimizer_state_dict(model, optimizer, options=options)
set_optimizer_state_dict(model, optimizer, full, options=options)
expected = "betas (0.9, 0.999)"
came = f"betas {optimizer.param_groups[0]['betas']}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-049 shows" if shows else "SP-049 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
