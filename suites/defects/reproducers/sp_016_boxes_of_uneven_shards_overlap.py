"""SP-016: FSDP1 records overlapping rows for the shards of an uneven tensor.

    torchrun --standalone --nproc-per-node 2 sp_016_boxes_of_uneven_shards_overlap.py

What breaks: a tensor of 5 rows is sharded over 2 tensor-parallel ranks, 3 and 2 rows. FSDP1's
  extension makes a ShardedTensor of it, whose metadata say which rows each shard holds. These rows
  are wrong, or torch refuses them.
Why: each rank records that shard i begins at row i * (rows // ranks) and has the size of this
  rank's shard.
For whom: users who save sharded state with FSDP1 over tensor parallelism, where a dimension does
  not divide by the number of ranks.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
tensor = distribute_tensor(torch.ones(5, 8), mesh["tp"], [Shard(0)])
expected = "shards: 3 rows from row 0, 2 rows from row 3"
try:
    chunk = DTensorExtensions(None).chunk_tensor(tensor, 0, 1, 2, mesh["dp"].get_group())
    boxes = chunk.metadata().shards_metadata
    got = "shards: " + ", ".join(
        f"{b.shard_sizes[0]} rows from row {b.shard_offsets[0]}" for b in boxes
    )
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-016 shows" if shows else "SP-016 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
