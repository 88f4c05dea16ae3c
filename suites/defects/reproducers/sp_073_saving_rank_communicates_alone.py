"""SP-073: rank 0 hangs when it saves the optimizer state of HSDP over tensor parallelism.

    torchrun --standalone --nproc-per-node 8 sp_073_saving_rank_communicates_alone.py

What breaks: a tensor-parallel model under FSDP1 with replicas (HSDP) is asked for its full
  optimizer state with cpu_offload. Only rank 0 should get it, and rank 0 waits for ranks that never
  come.
Why: rank 0 alone keeps the state, and runs a collective for the tensor-parallel dimension. The
  other ranks skip it.
For whom: users who save the optimizer of HSDP over tensor parallelism; before torch 2.13 also
  without replicas.

Needs only torch. Ends with 0 where torch is right, with 1 where rank 0 waits for 8 s.
"""

import faulthandler
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
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
# The groups of a mesh wait for 30 minutes, which nobody wants to see.
alone = f"rank 0: expected {expected}; got a collective that no other rank joined\nSP-073 shows"


def give_up():
    print(alone, flush=True)
    os._exit(1)


timer = threading.Timer(8, give_up)
if rank == 0:
    timer.start()
try:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    got = expected if bool(state) == (rank == 0) else f"{list(state)}"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"
timer.cancel()

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-073 shows" if shows else "SP-073 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
