"""SP-084: a backward fails where a tensor-parallel parameter under DDP gets no gradient.

    torchrun --standalone --nproc-per-node 4 sp_084_unused_parameter_breaks_the_backward.py

What breaks: an autograd function takes a tensor-parallel parameter and returns None for its
  gradient, as a function does that trains only a part of its inputs. The backward raises.
Why: autograd hands the missing gradient on as a plain tensor of zeros. The backward of
  DTensor.from_local() before torch 2.12 expects a DTensor.
For whom: users of torch before 2.12 who train TP x DDP with an autograd function of their own.

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


class InputOnly(torch.autograd.Function):
    """A product that hands a gradient to the input, and none to the weight."""

    @staticmethod
    def forward(ctx, x, weight):
        local = weight.to_local()
        ctx.save_for_backward(local)
        return x @ local.T

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.saved_tensors[0], None


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return InputOnly.apply(self.first(x), self.second.weight)


mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = Model()
parallelize_module(model, mesh["tp"], {"second": ColwiseParallel()})
model = DistributedDataParallel(model, device_mesh=mesh["dp"], find_unused_parameters=True)
expected = "a backward without an error"
try:
    model(torch.ones(4, 8)).sum().backward()
    got = expected
except Exception as error:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-084 shows" if shows else "SP-084 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
