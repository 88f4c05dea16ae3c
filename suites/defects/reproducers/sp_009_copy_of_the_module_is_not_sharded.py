"""SP-009: a deepcopy of a module under TP x DDP uses its shards as whole tensors.

    torchrun --standalone --nproc-per-node 4 sp_009_copy_of_the_module_is_not_sharded.py

What breaks: a module returns the sum of its sharded weight of 64 ones. DDP wraps it, and its copy
  returns 32, the sum of one rank's shard.
Why: between forwards the parameters are local tensors, and their spec is an attribute of the
  Parameter object. deepcopy() does not copy this attribute, so the copy cannot make DTensors again.
For whom: users who copy a model under tensor parallelism and DDP, as for a moving average of the
  weights or for evaluation.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import copy
import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


class Sum(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self):
        total = self.weight.sum()
        return total.full_tensor() if isinstance(total, DTensor) else total


mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = DistributedDataParallel(
    Sum(distribute_tensor(torch.ones(8, 8), mesh["tp"], [Shard(0)])), device_mesh=mesh["dp"]
)
expected = "a copy that returns 64.0"
got = f"a copy that returns {copy.deepcopy(model.module)().item()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-009 shows" if shows else "SP-009 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
