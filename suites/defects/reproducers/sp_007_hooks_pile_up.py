"""SP-007: wrapping a module in DDP again registers all tensor-parallel hooks again.

    torchrun --standalone --nproc-per-node 4 sp_007_hooks_pile_up.py

What breaks: DDP wraps a tensor-parallel module twice, as a trainer that makes a new wrapper does.
  The module then runs each forward hook twice.
Why: the transform before DDP registers its two forward hooks on the module with each call, and does
  not look for hooks that it registered before.
For whom: users who wrap the same tensor-parallel module more than once: each forward gets slower
  and keeps more memory.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
DistributedDataParallel(model, device_mesh=mesh["dp"])
expected = (
    f"hooks: {len(model._forward_pre_hooks)} pre-forward, {len(model._forward_hooks)} forward"
)
DistributedDataParallel(model, device_mesh=mesh["dp"])
got = f"hooks: {len(model._forward_pre_hooks)} pre-forward, {len(model._forward_hooks)} forward"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-007 shows" if shows else "SP-007 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
