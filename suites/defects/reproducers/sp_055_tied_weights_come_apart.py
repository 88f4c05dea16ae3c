"""SP-055: tied targets come apart when a full state dict is loaded.

    torchrun --standalone --nproc-per-node 2 sp_055_tied_weights_come_apart.py

A model on meta has two layers of one weight. Rank 0 broadcasts a full state dict into it; the
weights are to share their memory still. Needs torch alone. Ends with 0 where torch is right, with 1
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

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

with torch.device("meta"):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
set_model_state_dict(
    model,
    {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = "two names of one memory"
tied = model[0].weight.data_ptr() == model[1].weight.data_ptr()
came = expected if tied else "two weights, each with memory of its own"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-055 shows" if shows else "SP-055 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
