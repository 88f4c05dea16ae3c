"""SP-019: FSDP1 communicates to take a chunk of a weight that the rank holds already.

    torchrun --standalone --nproc-per-node 4 sp_019_whole_weights_are_gathered_to_be_chunked.py

What breaks: a weight is sharded by rows, and each rank already holds the rows of its chunk.
  DTensorExtensions.chunk_dtensor() still runs collectives.
Why: the function describes the chunk by placements that do not match how FSDP1 shards rows, so
  redistribute() has to move rows between ranks.
For whom: users who save or load FSDP1 over tensor parallelism: each row-wise weight is gathered,
  and each rank needs memory for the whole weight.

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
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
weight = distribute_tensor(torch.ones(16, 8), mesh["tp"], [Shard(0)])
with CommDebugMode() as seen:
    DTensorExtensions(None).chunk_dtensor(weight, mesh["dp"].get_local_rank(), mesh["dp"])
expected = "0 collectives"
got = f"{seen.get_total_counts()} collectives"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-019 shows" if shows else "SP-019 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
