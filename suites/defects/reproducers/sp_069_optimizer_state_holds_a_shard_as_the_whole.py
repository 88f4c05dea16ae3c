"""SP-069: the optimizer state of a model under TP x DDP holds this rank's shards as whole tensors.

    torchrun --standalone --nproc-per-node 4 sp_069_optimizer_state_holds_a_shard_as_the_whole.py

A weight of 16 rows lies on 2 ranks of tensor parallelism, 8 rows each, under DDP. The full
optimizer state is to hold a moment for each row. Needs torch alone. Ends with 0 where torch is
right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
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
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
optimizer = torch.optim.Adam(model.parameters())
options = StateDictOptions(full_state_dict=True)
moments = get_optimizer_state_dict(model, optimizer, options=options)["state"]["0.weight"]
expected = "moments of shape (16, 8)"
came = f"moments of shape {tuple(moments['exp_avg'].shape)}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-069 shows" if shows else "SP-069 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
