"""SP-053: a 0-dim value takes a DTensor's place as a plain CPU tensor.

    torchrun --standalone --nproc-per-node 2 sp_053_scalar_parameter_is_no_dtensor_any_more.py

A model has a weight and a scale without dimensions, both DTensors, and is made on meta. Rank 0
broadcasts a full state dict into it. Needs torch alone. Ends with 0 where torch is right, with 1
where not.
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
from torch.distributed.tensor import DTensor, distribute_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

with torch.device("meta"):
    model = nn.Linear(2, 2, bias=False)
    model.scale = nn.Parameter(torch.tensor(1.0))
distribute_module(model, init_device_mesh("cpu", (size,)))
full = {"weight": torch.ones(2, 2), "scale": torch.tensor(3.0)}
set_model_state_dict(
    model,
    full if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = "DTensor weight, DTensor scale"
came = ", ".join(
    f"{'DTensor' if isinstance(param.data, DTensor) else 'plain'} {name}"
    for name, param in model.named_parameters()
)

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-053 shows" if shows else "SP-053 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
