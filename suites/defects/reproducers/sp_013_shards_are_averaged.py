"""SP-013: DDP over the ranks of tensor parallelism overwrites the shards of other ranks.

    torchrun --standalone --nproc-per-node 4 sp_013_shards_are_averaged.py

What breaks: DDP gets the mesh dimension of tensor parallelism instead of its own. It sends rank 0's
  shard to the ranks that hold different shards, and then averages their gradients.
Why: DDP takes all its ranks for replicas. Nobody compares its group with the meshes of the
  parameters.
For whom: users who pass the wrong mesh dimension or the default group to DDP: the model is damaged,
  and no error is raised.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
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
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
shard = model[0].weight.to_local().detach().clone()
expected = "an error that names 'weight', or the rank's own shard"
try:
    ddp = DistributedDataParallel(model, device_mesh=mesh["tp"])
    got = expected if model[0].weight.equal(shard) else "no error, and the shard of another rank"
    ddp(torch.ones(2, 8)).sum().backward()
except Exception as error:
    got = expected if "weight" in str(error) else f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-013 shows" if shows else "SP-013 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
