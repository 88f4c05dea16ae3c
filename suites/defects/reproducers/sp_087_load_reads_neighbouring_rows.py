"""SP-087: torch.distributed.checkpoint loads the wrong rows into a shard of several pieces.

    torchrun --standalone --nproc-per-node 2 sp_087_load_reads_neighbouring_rows.py

What breaks: rows 0 to 7 are saved from Shard(0). They are loaded into a tensor that holds rows 0,
  1, 4 and 5 on rank 0, and the others on rank 1. Rank 0 gets rows 0 to 3, rank 1 rows 2 to 5.
Why: the checkpoint takes what a rank holds for one box: an offset and a size. A _StridedShard with
  a split factor of 2 on a mesh of one dimension is two.
For whom: users whose DTensors are reshaped: torch 2.13 makes such a placement of columns in
  reshape(-1). It is private, and imported here because torch 2.11 has no public call for it.

To save such a tensor is refused: its boxes overlap.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
rows = torch.arange(8.0)
pieces = [_StridedShard(0, split_factor=2)]
wanted = distribute_tensor(rows, mesh, pieces).to_local().tolist()
loaded = {"rows": distribute_tensor(torch.zeros(8), mesh, pieces)}
with tempfile.TemporaryDirectory() as own:
    folder = [own]
    dist.broadcast_object_list(folder)
    dcp.save({"rows": distribute_tensor(rows, mesh, [Shard(0)])}, checkpoint_id=folder[0])
    dcp.load(loaded, checkpoint_id=folder[0])
    dist.barrier()  # rank 0 removes the folder
held = loaded["rows"].to_local().tolist()
expected = "the rows of this rank"
got = expected if held == wanted else f"rows {held} instead of {wanted}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-087 shows" if shows else "SP-087 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
