"""SP-003: a frozen weight under tensor parallelism trains once DDP wraps it.

    torchrun --standalone --nproc-per-node 4 sp_003_frozen_weight_starts_to_train.py

The first layer is frozen, as under an adapter, the second one trains. Both are sharded by tensor
parallelism, then wrapped in DDP. Needs torch alone. Ends with 0 where torch is right, with 1 where
not.
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
model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
model[0].requires_grad_(False)
expected = "training of " + ", ".join(n for n, p in model.named_parameters() if p.requires_grad)
DistributedDataParallel(model, device_mesh=mesh["dp"])
came = "training of " + ", ".join(n for n, p in model.named_parameters() if p.requires_grad)

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-003 shows" if shows else "SP-003 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
