"""SP-096: _all_gather_dtensor() mixes rows of a weight that is sharded in stripes.

    torchrun --standalone --nproc-per-node 4 sp_096_stripes_are_gathered_mixed.py

What breaks: a weight of 12 rows lies over two by two ranks as [_StridedShard(0, split_factor=3),
  Shard(0)]. Gathered over the first dimension, no rank has the rows of its shard of the second.
Why: DTensor takes a _StridedShard for one that was cut after the Shard to its right, as fully_shard
  makes it. That is so only where its split factor is the number of ranks there.
For whom: authors of frameworks who call the private function on fused weights.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import fsdp  # noqa: F401 -- before tensor.parallel.fsdp, which imports it
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel.fsdp import _all_gather_dtensor
from torch.distributed.tensor.placement_types import _StridedShard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2))
first, second = divmod(rank, 2)
# Three stripes of four rows, each cut in two over the first dimension, then all over the second.
rows = [4 * stripe + 2 * first + row for stripe in range(3) for row in range(2)]
mine = torch.tensor(rows[3 * second : 3 * second + 3])
placements = [_StridedShard(0, split_factor=3), Shard(0)]
weight = DTensor.from_local(mine, mesh, placements, run_check=False, shape=(12,), stride=(1,))
wanted = list(range(6 * second, 6 * second + 6))
expected = "the rows of its shard, or a ValueError: ranks outside of the first dimension have some"
try:
    found = _all_gather_dtensor(weight, mesh).tolist()
    got = expected if found == wanted else f"rows {found} instead of {wanted}"
except ValueError:
    got = expected
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-096 shows" if shows else "SP-096 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
