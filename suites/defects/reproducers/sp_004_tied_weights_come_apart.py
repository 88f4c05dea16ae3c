"""SP-004: weights that are tied and sharded come apart, or are refused, under DDP.

    torchrun --standalone --nproc-per-node 4 sp_004_tied_weights_come_apart.py

The output layer of a model under tensor parallelism uses the weight of the embedding. DDP wraps it.
Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

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
model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": RowwiseParallel(), "1": ColwiseParallel()})
model[1].weight = model[0].weight
expected = "one parameter under both names"
try:
    DistributedDataParallel(model, device_mesh=mesh["dp"])
    came = expected if model[0].weight is model[1].weight else "two parameters"
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-004 shows" if shows else "SP-004 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
