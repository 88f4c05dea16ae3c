"""SP-009: a copy of a module under TP x DDP computes with its shards as if they were whole.

    torchrun --standalone --nproc-per-node 4 sp_009_copy_of_the_module_is_not_sharded.py

A module, whose forward gives the sum of its sharded weight, is wrapped in DDP and copied. Needs
torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import copy
import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


class Sum(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self):
        total = self.weight.sum()
        return total.full_tensor() if isinstance(total, DTensor) else total


mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = DistributedDataParallel(
    Sum(distribute_tensor(torch.ones(8, 8), mesh["tp"], [Shard(0)])), device_mesh=mesh["dp"]
)
expected = "a sum of 64.0"
came = f"a sum of {copy.deepcopy(model.module)().item()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-009 shows" if shows else "SP-009 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
