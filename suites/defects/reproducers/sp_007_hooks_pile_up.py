"""SP-007: wrapping a module in DDP again adds all hooks of tensor parallelism again.

    torchrun --standalone --nproc-per-node 4 sp_007_hooks_pile_up.py

DDP wraps a module under tensor parallelism twice, as a trainer does that makes a new wrapper. Each
hook that it gets runs in each forward. Needs torch alone. Ends with 0 where torch is right, with 1
where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
DistributedDataParallel(model, device_mesh=mesh["dp"])
expected = f"{len(model._forward_pre_hooks)} hooks before and {len(model._forward_hooks)} after"
DistributedDataParallel(model, device_mesh=mesh["dp"])
came = f"{len(model._forward_pre_hooks)} hooks before and {len(model._forward_hooks)} after"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-007 shows" if shows else "SP-007 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
