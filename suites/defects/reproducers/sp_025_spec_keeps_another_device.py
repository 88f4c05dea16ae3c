"""SP-025: an EnumerableShardingSpec keeps the device that its placements name.

    torchrun --standalone --nproc-per-node 2 sp_025_spec_keeps_another_device.py

The state of a table was moved from a GPU to the CPU, and its spec is to follow. All names are
private, as torch has no public one for such a spec. No GPU is needed. Needs torch alone. Ends with
0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec, ShardMetadata
from torch.distributed.tensor.parallel.fsdp import _rewrite_spec_if_needed

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

shards = [ShardMetadata([4 * r, 0], [4, 4], f"rank:{r}/cuda:0") for r in range(size)]
spec = _rewrite_spec_if_needed(EnumerableShardingSpec(shards), torch.ones(4, 4), rank)
expected = "a shard on the device cpu"
came = f"a shard on the device {spec.shards[rank].placement.device()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-025 shows" if shows else "SP-025 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
