"""SP-001: parameters under tensor parallelism vanish from the module after its first forward.

    torchrun --standalone --nproc-per-node 4 sp_001_parameters_vanish_after_a_forward.py

A model under TP x DDP does one forward, and names its parameters before and after. Needs torch
alone. Ends with 0 where torch is right, with 1 where not.
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
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
expected = ", ".join(name for name, _ in model.named_parameters())
model(torch.ones(4, 8)).sum().backward()
came = ", ".join(name for name, _ in model.named_parameters())

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-001 shows" if shows else "SP-001 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
