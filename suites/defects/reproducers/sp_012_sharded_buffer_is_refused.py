"""SP-012: a sharded buffer is refused by DDP.

    torchrun --standalone --nproc-per-node 4 sp_012_sharded_buffer_is_refused.py

A model under tensor parallelism has a buffer that is sharded like its weight. DDP wraps it. Needs
torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
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
model[0].register_buffer("scale", distribute_tensor(torch.ones(16), mesh["tp"], [Shard(0)]))
expected = "a wrapped model"
try:
    DistributedDataParallel(model, device_mesh=mesh["dp"])
    came = expected
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-012 shows" if shows else "SP-012 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
