"""SP-016: the boxes that describe uneven shards overlap, and differ from rank to rank.

    torchrun --standalone --nproc-per-node 2 sp_016_boxes_of_uneven_shards_overlap.py

A tensor of 5 rows lies on 2 ranks of tensor parallelism, as 3 and 2 rows. FSDP1's extension chunks
it as a ShardedTensor, which says where each shard lies. Needs torch alone. Ends with 0 where torch
is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
tensor = distribute_tensor(torch.ones(5, 8), mesh["tp"], [Shard(0)])
expected = "3 rows from row 0, 2 rows from row 3"
try:
    chunk = DTensorExtensions(None).chunk_tensor(tensor, 0, 1, 2, mesh["dp"].get_group())
    boxes = chunk.metadata().shards_metadata
    came = ", ".join(f"{b.shard_sizes[0]} rows from row {b.shard_offsets[0]}" for b in boxes)
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-016 shows" if shows else "SP-016 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
