"""SP-018: FSDP1's extension for tensor parallelism cannot chunk a scalar.

    torchrun --standalone --nproc-per-node 4 sp_018_scalar_cannot_be_chunked.py

What breaks: DTensorExtensions.chunk_dtensor() gets a tensor without dimensions and raises.
Why: the function shards every tensor by dimension 0, which a scalar does not have.
For whom: authors of FSDP extensions who call DTensorExtensions themselves. FSDP1 itself never
  passes a scalar.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
extension = DTensorExtensions(None)
expected = "a chunk that holds 3.0"
try:
    chunk = extension.chunk_dtensor(torch.tensor(3.0), mesh["dp"].get_local_rank(), mesh["dp"])
    got = f"a chunk that holds {chunk.full_tensor().item()}"
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-018 shows" if shows else "SP-018 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
