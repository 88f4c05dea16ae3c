"""SP-017: the sharded optimizer state of FSDP1 over tensor parallelism names the wrong ranks.

    torchrun --standalone --nproc-per-node 4 sp_017_optimizer_state_names_other_ranks.py

What breaks: a tensor-parallel model under FSDP1 trains for a step. sharded_optim_state_dict() names
  ranks that do not hold the shards, or raises.
Why: each rank records itself for the first shard and a placeholder for all others. It records ranks
  of the group, where ShardedTensor expects global ranks.
For whom: users who save with FullyShardedDataParallel.sharded_optim_state_dict() over tensor
  parallelism.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model(torch.ones(2, 8)).sum().backward()
optimizer.step()
expected = "shards on the ranks of this rank's tensor-parallel group, in order"
try:
    state = FullyShardedDataParallel.sharded_optim_state_dict(model, optimizer)
    shards = state["state"]["0.weight"]["momentum_buffer"].metadata().shards_metadata
    ranks = [shard.placement.rank() for shard in shards]
    right = ranks == dist.get_process_group_ranks(mesh["tp"].get_group())
    got = expected if right else f"shards on the ranks {ranks}"
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-017 shows" if shows else "SP-017 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
