"""SP-006: a whole weight is taken for the shard of a layer under tensor parallelism.

    torchrun --standalone --nproc-per-node 4 sp_006_weight_of_another_shape_is_used_as_the_shard.py

After DDP has wrapped the model, .data of a sharded parameter is set to the whole weight, as by
loading code that knows nothing of tensor parallelism. Needs torch alone. Ends with 0 where torch is
right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
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
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
ddp = DistributedDataParallel(model, device_mesh=mesh["dp"])
model[0].weight.data = torch.ones(16, 8)  # where this rank's shard has the shape (8, 8)
expected = "an error that names the shape"
try:
    came = f"an output of {ddp(torch.ones(1, 8)).shape[1]} columns on a rank that computes 8 of 16"
except Exception as error:
    came = expected if "shape" in str(error) else f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-006 shows" if shows else "SP-006 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
