"""SP-011: replicate() replaces the parameters of an optimizer in the first forward.

    torchrun --standalone --nproc-per-node 4 sp_011_replicate_leaves_the_optimizer_behind.py

A model under tensor parallelism is wrapped in replicate(), and gets its optimizer then. It trains
for a step. The import is private, as torch has no public one. Needs torch alone. Ends with 0 where
torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
replicate(model, device_mesh=mesh["dp"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = model(torch.ones(4, 8))
before.sum().backward()
optimizer.step()
expected = "another output after the step"
came = "the same output after the step" if model(torch.ones(4, 8)).equal(before) else expected

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-011 shows" if shows else "SP-011 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
