"""SP-010: an optimizer that was made before DDP wrapped the model trains nothing.

    torchrun --standalone --nproc-per-node 4 sp_010_optimizer_from_before_ddp_trains_nothing.py

A model under tensor parallelism gets its optimizer, and is wrapped in DDP then, as is legal without
tensor parallelism. It trains for a step. Needs torch alone. Ends with 0 where torch is right, with
1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
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
    print("SP-010 shows" if shows else "SP-010 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
