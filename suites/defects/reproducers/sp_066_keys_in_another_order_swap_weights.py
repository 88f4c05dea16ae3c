"""SP-066: a full state dict that every rank holds is scattered by rank 0, tensor by tensor.

    torchrun --standalone --nproc-per-node 2 sp_066_keys_in_another_order_swap_weights.py

Each rank has the full state dict of a sharded model; rank 1's names its keys in another order. Each
tensor is scattered by rank 0, one after the other, so that rank 1 gets the parts of other weights.
Needs torch alone. Ends with 0 where torch is right, with 1 where not.
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
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
full = {"0.weight": torch.zeros(2, 2), "1.weight": torch.ones(2, 2)}
if rank == 1:
    full = dict(reversed(full.items()))
set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))
expected = "rows of 0.0 in 0.weight, of 1.0 in 1.weight"
rows = [layer.weight.to_local().mean().item() for layer in model]
came = f"rows of {rows[0]} in 0.weight, of {rows[1]} in 1.weight"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-066 shows" if shows else "SP-066 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
