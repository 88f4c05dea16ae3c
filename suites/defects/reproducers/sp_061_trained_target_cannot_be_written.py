"""SP-061: tensors that train cannot be written.

    torchrun --standalone --nproc-per-node 2 sp_061_trained_target_cannot_be_written.py

Rank 0 broadcasts a full state dict into a sharded parameter that trains, with autograd on. Only
private functions are met so, here _broadcast_state_dict(): set_model_state_dict() turns autograd
off. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._state_dict_utils import _broadcast_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
mine = {"weight": nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)]))}
expected = "a row of [1.0, 1.0]"
try:
    full = {"weight": torch.ones(2, 2)} if rank == 0 else {}
    _broadcast_state_dict(full, mine, torch.device("cpu"))
    came = f"a row of {mine['weight'].to_local()[0].tolist()}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-061 shows" if shows else "SP-061 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
