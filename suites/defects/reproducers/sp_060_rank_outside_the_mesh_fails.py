"""SP-060: a rank outside of a tensor's mesh takes part.

    torchrun --standalone --nproc-per-node 3 sp_060_rank_outside_the_mesh_fails.py

A weight lies on ranks 0 and 1 of three. Rank 0 broadcasts a full state dict into the model; rank 2,
which has no part of the weight, is to take none. Needs torch alone. Ends with 0 where torch is
right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = DeviceMesh("cpu", [0, 1])
model = nn.Module()
model.weight = nn.Parameter(distribute_tensor(torch.zeros(4, 2), mesh, [Shard(0)]))
expected = "a load without an error"
try:
    set_model_state_dict(
        model,
        {"weight": torch.ones(4, 2)} if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    came = expected
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-060 shows" if shows else "SP-060 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
