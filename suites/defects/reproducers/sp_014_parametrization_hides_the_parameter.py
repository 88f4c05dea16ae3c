"""SP-014: a parametrization under TP x DDP loses the Parameter that the optimizer holds.

    torchrun --standalone --nproc-per-node 4 sp_014_parametrization_hides_the_parameter.py

What breaks: DDP wraps a tensor-parallel model, then its weight is parametrized, and a forward
  follows. The parametrization now holds a DTensor that is no Parameter.
Why: in each forward DDP's hooks put a DTensor in place of each local Parameter, and do not find it
  again to put the Parameter back.
For whom: users who add weight norm, LoRA by parametrization or other hooks after they wrap a
  tensor-parallel model in DDP: the optimizer trains a tensor that the model no longer uses.

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
from torch.nn.utils import parametrize

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
expected = "the Parameter that the optimizer holds"
ddp(torch.ones(2, 8))
held = model[0].parametrizations.weight.original
got = expected if held is trained else f"a {type(held).__name__} that is not this Parameter"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-014 shows" if shows else "SP-014 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
