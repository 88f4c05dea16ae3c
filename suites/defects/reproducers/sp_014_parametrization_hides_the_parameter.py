"""SP-014: a parametrization under TP x DDP puts another weight in the parameter's place.

    torchrun --standalone --nproc-per-node 4 sp_014_parametrization_hides_the_parameter.py

DDP wraps a model under tensor parallelism. Then its weight is parametrized, and a forward follows.
Needs torch alone. Ends with 0 where torch is right, with 1 where not.
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
from torch.nn.utils import parametrize

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


class Double(nn.Module):
    def forward(self, weight):
        return weight * 2


mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
ddp = DistributedDataParallel(model, device_mesh=mesh["dp"])
trained = model[0].weight  # what an optimizer holds
parametrize.register_parametrization(model[0], "weight", Double(), unsafe=True)
expected = "the weight that is trained"
ddp(torch.ones(2, 8))
held = model[0].parametrizations.weight.original
came = expected if held is trained else f"another {type(held).__name__}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-014 shows" if shows else "SP-014 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
