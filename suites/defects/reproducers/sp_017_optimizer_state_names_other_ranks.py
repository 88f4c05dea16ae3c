"""SP-017: the ShardedTensor around FSDP1's chunks names ranks that do not hold them.

    torchrun --standalone --nproc-per-node 4 sp_017_optimizer_state_names_other_ranks.py

A model under tensor parallelism and FSDP1 trains for a step. Its sharded optimizer state says which
rank holds which rows. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
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
expected = "shards on the ranks of the tensor-parallel group, in their order"
try:
    state = FullyShardedDataParallel.sharded_optim_state_dict(model, optimizer)
    shards = state["state"]["0.weight"]["momentum_buffer"].metadata().shards_metadata
    ranks = [shard.placement.rank() for shard in shards]
    right = ranks == dist.get_process_group_ranks(mesh["tp"].get_group())
    came = expected if right else f"shards on the ranks {ranks}"
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-017 shows" if shows else "SP-017 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
