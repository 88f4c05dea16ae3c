"""SP-080: FSDP1 clips tensor-parallel gradients by the norm of one rank's shard.

    torchrun --standalone --nproc-per-node 4 sp_080_clipping_takes_the_norm_of_a_shard.py

What breaks: a tensor-parallel model under FSDP1 has 64 gradients of 1, whose norm is 8.
  model.clip_grad_norm_() returns a smaller norm.
Why: FSDP1 sums the squares only over its own process group, and not over the tensor-parallel ranks.
For whom: users who clip gradients under FSDP1 over tensor parallelism: each rank scales by its own
  factor.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
got = f"a norm of {norm.item():.1f}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-080 shows" if shows else "SP-080 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
