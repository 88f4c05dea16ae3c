"""SP-006: DDP uses a tensor of the wrong shape as the shard of a tensor-parallel layer.

    torchrun --standalone --nproc-per-node 4 sp_006_weight_of_another_shape_is_used_as_the_shard.py

What breaks: after DDP has wrapped the model, code that knows nothing of tensor parallelism sets
  .data of a sharded parameter to the whole weight. The forward computes with it.
Why: each forward calls DTensor.from_local(run_check=False) with the old global shape, and compares
  it with no shape.
For whom: users who load or replace weights by param.data = ... in a model with tensor parallelism
  inside DDP.

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
ddp = DistributedDataParallel(model, device_mesh=mesh["dp"])
model[0].weight.data = torch.ones(16, 8)  # where this rank's shard has the shape (8, 8)
expected = "an error that names the shape"
try:
    columns = ddp(torch.ones(1, 8)).shape[1]
    got = f"no error, and {columns} output columns from a layer with 8 of 16 on this rank"
except Exception as error:
    got = expected if "shape" in str(error) else f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-006 shows" if shows else "SP-006 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
