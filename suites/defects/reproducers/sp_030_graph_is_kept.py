"""SP-030: gathering a weight keeps the autograd graph of the live parameters alive.

    torchrun --standalone --nproc-per-node 4 sp_030_graph_is_kept.py

What breaks: FSDP1's extension for tensor parallelism gathers a weight that requires grad. The
  result has a grad_fn.
Why: the function gathers without no_grad() and without detach(), so autograd records the gather.
For whom: users who gather parameters or state dicts with keep_vars=True: the graph stays in memory
  as long as the result.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
weight = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Replicate()]).requires_grad_()
local = DTensorExtensions(None).all_gather_dtensor(weight, mesh)
expected = "a tensor without a grad_fn"
got = f"a tensor with the grad_fn {local.grad_fn.name()}" if local.requires_grad else expected

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-030 shows" if shows else "SP-030 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
