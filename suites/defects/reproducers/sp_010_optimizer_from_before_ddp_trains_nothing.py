"""SP-010: an optimizer that was made before DDP wraps a tensor-parallel model trains nothing.

    torchrun --standalone --nproc-per-node 4 sp_010_optimizer_from_before_ddp_trains_nothing.py

What breaks: the optimizer is made before DDP wraps the model, which is legal without tensor
  parallelism. The step does not change the output.
Why: when DDP wraps the model, each DTensor parameter is replaced by a new Parameter. The optimizer
  keeps the old ones.
For whom: users who make the optimizer before DDP: the loss does not fall, and no error says why.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
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
    print("SP-010 shows" if shows else "SP-010 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
