"""SP-021: weights under HSDP are cut along the replicas instead of along the shards.

    torchrun --standalone --nproc-per-node 4 sp_021_hsdp_shards_over_the_replicas.py

FSDP1 replicates over 2 ranks and shards over 2, of a mesh that has a dimension of tensor
parallelism, too. The weight is outside of tensor parallelism. Needs torch alone. Ends with 0 where
torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("replicate", "shard", "tp"))
model = FullyShardedDataParallel(
    nn.Linear(8, 8),
    device_mesh=mesh["replicate", "shard"],
    device_id=torch.device("cpu"),
    sharding_strategy=ShardingStrategy.HYBRID_SHARD,
)
weight = get_model_state_dict(model)["weight"]
expected = "(Replicate(), Shard(dim=0), Replicate())"
came = str(weight.placements)

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-021 shows" if shows else "SP-021 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
