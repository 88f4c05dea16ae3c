"""SP-020: FSDP1 chunks uneven tensor-parallel shards by a global shape that the ranks do not share.

    torchrun --standalone --nproc-per-node 4 sp_020_uneven_shards_end_a_process.py

A weight of 5 rows lies on 2 ranks of tensor parallelism, as 3 and 2 rows, under FSDP1. Needs torch
alone. Ends with 0 where torch is right, with 1 where not: a rank claims another global shape, or
Gloo ends its process, which torchrun reports as SIGABRT.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
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
model = nn.Sequential(nn.Linear(8, 5, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
expected = "a weight of shape (5, 8)"
came = f"a weight of shape {tuple(get_model_state_dict(model)['0.weight'].shape)}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-020 shows" if shows else "SP-020 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
