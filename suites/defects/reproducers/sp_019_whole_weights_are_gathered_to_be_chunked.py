"""SP-019: FSDP1 moves whole weights between ranks to chunk them.

    torchrun --standalone --nproc-per-node 4 sp_019_whole_weights_are_gathered_to_be_chunked.py

FSDP1's extension for tensor parallelism chunks a weight that is sharded by rows, of which each rank
has the rows that it needs. The collectives are counted. Needs torch alone. Ends with 0 where torch
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
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
weight = distribute_tensor(torch.ones(16, 8), mesh["tp"], [Shard(0)])
with CommDebugMode() as seen:
    DTensorExtensions(None).chunk_dtensor(weight, mesh["dp"].get_local_rank(), mesh["dp"])
expected = "0 collectives"
came = f"{seen.get_total_counts()} collectives"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-019 shows" if shows else "SP-019 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
