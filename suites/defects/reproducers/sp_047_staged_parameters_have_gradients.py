"""SP-047: staging deep-copies a DTensor before it replaces its memory.

    torchrun --standalone --nproc-per-node 1 sp_047_staged_parameters_have_gradients.py

BlockingAsyncStager stages a model's sharded parameters after a backward, for async_save(). What is
staged is to hold values alone; the deep copy brings along a copy of each gradient. Needs torch
alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(2, 2, bias=False)
distribute_module(model, init_device_mesh("cpu", (size,)))
for param in model.parameters():
    param.grad = torch.ones_like(param)
staged = BlockingAsyncStager().stage(dict(model.named_parameters()))
expected = "staged weight without a gradient"
came = f"staged weight {'without' if staged['weight'].grad is None else 'with'} a gradient"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-047 shows" if shows else "SP-047 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
