"""SP-052: targets that hold several pieces of a weight (_StridedShard) receive other elements.

    torchrun --standalone --nproc-per-node 2 sp_052_two_pieces_receive_other_elements.py

Each rank holds two pieces of a weight, which DTensor calls a _StridedShard: flatten() of a weight
that is sharded by columns makes one since torch 2.12. The class is private. Rank 0 broadcasts a
full state dict into the model; ranks take one piece that is as long as both. Needs torch alone.
Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
placements = [_StridedShard(0, split_factor=2)]
model = nn.Module()
model.weight = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, placements, run_check=False))
full = torch.arange(8.0)
set_model_state_dict(
    model,
    {"weight": full} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
mine = f"elements {full.reshape(2, 2, 2)[:, rank].flatten().tolist()}"
got = f"elements {model.weight.to_local().tolist()}"
expected = "the elements of this rank's two pieces"
came = expected if got == mine else f"{got} where {mine} lie"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-052 shows" if shows else "SP-052 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
