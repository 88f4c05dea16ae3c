"""SP-004: DDP refuses tied tensor-parallel weights, and replicate() unties them.

    torchrun --standalone --nproc-per-node 4 sp_004_tied_weights_come_apart.py

What breaks: the output layer shares the weight of the embedding, and tensor parallelism shards it.
  DDP raises; replicate() makes two parameters of it.
Why: named_parameters() lists a tied parameter once. The transform before DDP replaces the parameter
  under this one name, and the other layer keeps the old DTensor.
For whom: users who train a language model with a tied embedding with tensor parallelism inside DDP
  or replicate().

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

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
model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": RowwiseParallel(), "1": ColwiseParallel()})
model[1].weight = model[0].weight
expected = "one parameter in both layers"
try:
    DistributedDataParallel(model, device_mesh=mesh["dp"])
    got = expected if model[0].weight is model[1].weight else "one parameter in each layer"
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-004 shows" if shows else "SP-004 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
