"""SP-011: the first forward under replicate() disconnects the optimizer from the model.

    torchrun --standalone --nproc-per-node 4 sp_011_replicate_leaves_the_optimizer_behind.py

What breaks: a tensor-parallel model is wrapped in replicate(), then gets its optimizer, and trains
  for a step. The step does not change the output.
Why: replicate() replaces DTensor parameters by new ones in the first forward, and not when it
  wraps. The optimizer keeps the old ones.
For whom: users who use replicate() on a tensor-parallel model. torch has only a private import for
  replicate().

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
replicate(model, device_mesh=mesh["dp"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before = model(torch.ones(4, 8))
before.sum().backward()
optimizer.step()
expected = "an output that the step has changed"
got = (
    "an output that the step has not changed" if model(torch.ones(4, 8)).equal(before) else expected
)

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-011 shows" if shows else "SP-011 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
