"""SP-021: HSDP describes weights as sharded over the replicas.

    torchrun --standalone --nproc-per-node 4 sp_021_hsdp_shards_over_the_replicas.py

What breaks: FSDP1 replicates over 2 ranks and shards over 2, in a mesh that also has a
  tensor-parallel dimension. Its state dict describes the weight as sharded along the replicate
  dimension.
Why: for a weight without tensor parallelism, FSDP1 takes the first dimension of the root mesh as
  the one that it shards over.
For whom: users who save HSDP models in a mesh with a tensor-parallel dimension: the checkpoint
  describes shards where there are copies.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
expected = "(Replicate(), Shard(dim=0), Replicate()) on the mesh (replicate, shard, tp)"
got = f"{weight.placements} on the mesh (replicate, shard, tp)"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-021 shows" if shows else "SP-021 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
