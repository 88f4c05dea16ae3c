"""SP-025: an EnumerableShardingSpec keeps the old device after its tensor has moved.

    torchrun --standalone --nproc-per-node 2 sp_025_spec_keeps_another_device.py

What breaks: a table's spec says cuda:0, and its state was moved to the CPU.
  _rewrite_spec_if_needed() should change this rank's device to cpu, and does not.
Why: the function returns every spec that is not a ChunkShardingSpec unchanged.
For whom: authors who call this function of FSDP1. It is private, as is the spec; torch 2.13 does
  not call it. No GPU is needed.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torch.distributed.tensor.parallel.fsdp import _rewrite_spec_if_needed

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

shards = [ShardMetadata([4 * r, 0], [4, 4], f"rank:{r}/cuda:0") for r in range(size)]
spec = _rewrite_spec_if_needed(EnumerableShardingSpec(shards), torch.ones(4, 4), rank)
expected = "a spec that says cpu"
got = f"a spec that says {spec.shards[rank].placement.device()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-025 shows" if shows else "SP-025 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
