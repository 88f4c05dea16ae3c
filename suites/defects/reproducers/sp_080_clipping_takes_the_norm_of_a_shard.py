"""SP-080: FSDP1 clips tensor-parallel gradients by the norm of a shard.

    torchrun --standalone --nproc-per-node 4 sp_080_clipping_takes_the_norm_of_a_shard.py

A model under tensor parallelism and FSDP1 has gradients all of one. model.clip_grad_norm_() is to
give the norm of all 64, which is 8. Needs torch alone. Ends with 0 where torch is right, with 1
where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 8, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
model(torch.ones(1, 8)).sum().backward()
norm = model.clip_grad_norm_(1.0)
expected = "a norm of 8.0"
came = f"a norm of {norm.item():.1f}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-080 shows" if shows else "SP-080 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
