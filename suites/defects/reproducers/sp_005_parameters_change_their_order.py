"""SP-005: parameters change their order when DDP wraps a model under tensor parallelism.

    torchrun --standalone --nproc-per-node 4 sp_005_parameters_change_their_order.py

A layer has a sharded weight and a bias that is not. An optimizer numbers parameters in the order in
which the model names them, and loads its state by these numbers. Needs torch alone. Ends with 0
where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Linear(8, 8)
model.weight = nn.Parameter(distribute_tensor(model.weight, mesh["tp"], [Shard(0)]))
expected = ", ".join(name for name, _ in model.named_parameters())
DistributedDataParallel(model, device_mesh=mesh["dp"])
came = ", ".join(name for name, _ in model.named_parameters())

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-005 shows" if shows else "SP-005 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
