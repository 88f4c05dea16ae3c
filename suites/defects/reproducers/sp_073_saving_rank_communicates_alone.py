"""SP-073: one rank alone communicates for a full optimizer state of FSDP1 over tensor parallelism.

    torchrun --standalone --nproc-per-node 8 sp_073_saving_rank_communicates_alone.py

A model under tensor parallelism and FSDP1 with replicas (HSDP) is asked for its optimizer state
with full_state_dict and cpu_offload: rank 0 is to get it, others nothing. Rank 0 communicates for
it alone. Needs torch alone. Ends with 0 where torch is right, with 1 where rank 0 waits for 8 s.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("replicas", "dp", "tp"))
model = nn.Sequential(nn.Linear(8, 8, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model,
    device_mesh=mesh["replicas", "dp"],
    sharding_strategy=ShardingStrategy.HYBRID_SHARD,
    device_id=torch.device("cpu"),
    use_orig_params=True,
)
optimizer = torch.optim.Adam(model.parameters())
expected = "the optimizer state on rank 0, nothing elsewhere"
# The groups of a mesh have a timeout of 30 minutes.
wait = f"rank 0: expected {expected}; came a wait for others\nSP-073 shows"
alone = threading.Timer(8, lambda: os._exit(print(wait, flush=True) or 1))
if rank == 0:
    alone.start()
try:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    came = expected if bool(state) == (rank == 0) else f"{list(state)}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"
alone.cancel()

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-073 shows" if shows else "SP-073 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
