"""SP-041: a channels_last weight is row-major in a full state dict.

    torchrun --standalone --nproc-per-node 2 sp_041_channels_last_is_lost.py

A sharded weight of a convolution is channels_last. A full state dict is taken. Needs torch alone.
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

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
model = nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
model.weight = nn.Parameter(distribute_tensor(model.weight, mesh, [Shard(0)]))
expected = f"strides {model.weight.stride()}"
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
came = f"strides {full['weight'].stride()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-041 shows" if shows else "SP-041 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
