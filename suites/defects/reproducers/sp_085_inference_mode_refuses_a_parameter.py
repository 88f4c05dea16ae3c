"""SP-085: _all_gather_dtensor() refuses a DTensor that requires grad in inference mode.

    torchrun --standalone --nproc-per-node 4 sp_085_inference_mode_refuses_a_parameter.py

What breaks: in torch.inference_mode() a sharded parameter is gathered along the FSDP dimension of
  its mesh. The call raises, and does not in torch.no_grad().
Why: autograd detaches in place what redistribute() returns. In inference mode the call reaches
  DTensor, which before torch 2.13 knows no detach_().
For whom: libraries that call this private function, or FSDP1's extension of that name, while they
  serve. torch's own callers pass tensors that do not require grad.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel.fsdp import _all_gather_dtensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
full = torch.arange(32.0).reshape(8, 4)
weight = nn.Parameter(distribute_tensor(full, mesh, [Shard(0), Shard(1)]))
columns = full.chunk(2, dim=1)[mesh.get_local_rank("tp")]
expected = "the parameter's columns of this rank"
try:
    with torch.inference_mode():
        gathered = _all_gather_dtensor(weight, mesh)
    got = expected if gathered.equal(columns) else f"{gathered.tolist()}"
except Exception as error:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-085 shows" if shows else "SP-085 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
