"""SP-012: DDP refuses a model with a sharded buffer.

    torchrun --standalone --nproc-per-node 4 sp_012_sharded_buffer_is_refused.py

What breaks: a tensor-parallel layer has a buffer that is sharded like its weight. The constructor
  of DDP raises.
Why: the transform before DDP turns parameters into local tensors, but not buffers. DDP then
  broadcasts the buffers as plain tensors.
For whom: users who use layers with sharded buffers, such as scales or running statistics, with
  tensor parallelism inside DDP.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
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
model[0].register_buffer("scale", distribute_tensor(torch.ones(16), mesh["tp"], [Shard(0)]))
expected = "a model that DDP has wrapped"
try:
    DistributedDataParallel(model, device_mesh=mesh["dp"])
    got = expected
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-012 shows" if shows else "SP-012 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
