"""SP-081: tied tensor-parallel weights are flattened twice by FSDP1.

    torchrun --standalone --nproc-per-node 4 sp_081_tied_weights_are_two.py

Two layers share one weight under tensor parallelism, then come under FSDP1. They are to share it
still: one name, one tensor that trains. Needs torch alone. Ends with 0 where torch is right, with 1
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
model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": ColwiseParallel()})
model[1].weight = model[0].weight
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
expected = "weights: 0.weight"
came = "weights: " + ", ".join(name.split(".", 1)[1] for name, _ in model.named_parameters())

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-081 shows" if shows else "SP-081 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
