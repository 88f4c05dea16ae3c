"""SP-020: FSDP1 computes a wrong global shape for uneven tensor-parallel shards.

    torchrun --standalone --nproc-per-node 4 sp_020_uneven_shards_end_a_process.py

What breaks: a weight of 5 rows is sharded over 2 tensor-parallel ranks, 3 and 2 rows, under FSDP1.
  Its state dict has a wrong shape, or the process is ended.
Why: FSDP1 calls DTensor.from_local() without shape=, which multiplies this rank's rows by the
  number of ranks: 6 or 4. Collectives of different sizes follow.
For whom: users who save FSDP1 over tensor parallelism where a dimension does not divide by the
  number of ranks, such as a vocabulary or attention heads.

Needs only torch. Ends with 0 where torch is right, with 1 where not: a rank reports another global
shape, or Gloo ends its process, which torchrun reports as SIGABRT.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 5, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
expected = "a weight of shape (5, 8)"
if rank == 0:  # now: the process may not live to print it later
    print(f"expected {expected} on each rank; Gloo may end a rank instead", flush=True)
got = f"a weight of shape {tuple(get_model_state_dict(model)['0.weight'].shape)}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-020 shows" if shows else "SP-020 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
