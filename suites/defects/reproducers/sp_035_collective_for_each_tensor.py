"""SP-035: a full state dict takes a collective for each tensor.

    torchrun --standalone --nproc-per-node 2 sp_035_collective_for_each_tensor.py

A model has 20 sharded weights. The collectives of a full state dict are counted. Needs torch alone.
Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
weights = [distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]) for _ in range(20)]
model = nn.ParameterList(weights)
with CommDebugMode() as seen:
    get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
count = seen.get_total_counts()
expected = "fewer collectives than tensors"
came = expected if count < 20 else f"{count} collectives for 20 tensors"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-035 shows" if shows else "SP-035 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
