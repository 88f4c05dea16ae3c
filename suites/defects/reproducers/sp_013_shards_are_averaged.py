"""SP-013: DDP over the ranks of tensor parallelism sends rank 0's shard to the others.

    torchrun --standalone --nproc-per-node 4 sp_013_shards_are_averaged.py

A model under tensor parallelism is wrapped in DDP, which gets the dimension of tensor parallelism
instead of its own, so that it runs over the ranks that hold different shards. Needs torch alone.
Ends with 0 where torch is right, with 1 where not.
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
shard = model[0].weight.to_local().detach().clone()
expected = "an error that names 'weight', or the rank's own shard"
try:
    ddp = DistributedDataParallel(model, device_mesh=mesh["tp"])
    came = expected if model[0].weight.equal(shard) else "the shard of another rank"
    ddp(torch.ones(2, 8)).sum().backward()
except Exception as error:
    came = expected if "weight" in str(error) else f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-013 shows" if shows else "SP-013 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
