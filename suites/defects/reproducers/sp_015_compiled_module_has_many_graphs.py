"""SP-015: torch.compile breaks its graph at each tensor-parallel parameter under DDP.

    torchrun --standalone --nproc-per-node 4 sp_015_compiled_module_has_many_graphs.py

What breaks: a tensor-parallel model is wrapped in DDP and compiled as a whole. The backend gets
  several graphs instead of one.
Why: the hooks that swap DTensors and local tensors run inside the compiled module. torch.compile
  cannot trace their delattr() and setattr().
For whom: users who compile a model with tensor parallelism inside DDP: more graphs run slower, and
  some backends raise.

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
faulthandler.dump_traceback_later(40, exit=True)  # compiling is slow; a hang ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

graphs = []


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.up(x).relu())


def count(graph, inputs):
    graphs.append(graph)
    return graph.forward


mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = Block()
parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
ddp = DistributedDataParallel(model, device_mesh=mesh["dp"])
model.compile(backend=count)
expected = "1 graph for the whole model"
try:
    ddp(torch.ones(2, 8)).sum().backward()
    got = expected if len(graphs) == 1 else f"{len(graphs)} graphs"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-015 shows" if shows else "SP-015 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
