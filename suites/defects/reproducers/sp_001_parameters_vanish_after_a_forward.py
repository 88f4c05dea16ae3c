"""SP-001: tensor-parallel parameters vanish from the module after its first forward.

    torchrun --standalone --nproc-per-node 4 sp_001_parameters_vanish_after_a_forward.py

What breaks: after one forward under DDP, named_parameters() lists only the LayerNorm. state_dict(),
  zero_grad() and gradient clipping no longer see the sharded weights.
Why: in each forward DDP's hooks put a DTensor in place of each sharded Parameter. That DTensor is
  no Parameter, so the hook that should put the Parameter back does not find it.
For whom: users who train with tensor parallelism inside DDP or replicate(): a checkpoint that is
  saved after the first step lacks the sharded weights.

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
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
expected = "parameters " + ", ".join(name for name, _ in model.named_parameters())
model(torch.ones(4, 8)).sum().backward()
got = "parameters " + ", ".join(name for name, _ in model.named_parameters())

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-001 shows" if shows else "SP-001 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
