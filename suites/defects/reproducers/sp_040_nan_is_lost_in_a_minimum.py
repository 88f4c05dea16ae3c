"""SP-040: Gloo loses NaN in a pending minimum.

    torchrun --standalone --nproc-per-node 2 sp_040_nan_is_lost_in_a_minimum.py

A buffer is the pending minimum of what both ranks hold, NaN and 1. The minimum that torch computes
of these is NaN. A full state dict is taken. Needs torch alone. Ends with 0 where torch is right,
with 1 where not.
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
from torch.distributed.tensor import DTensor, Partial

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

values = [torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, float("nan")])]
mesh = init_device_mesh("cpu", (size,))
model = nn.Module()
model.register_buffer("lowest", DTensor.from_local(values[rank], mesh, [Partial("min")]))
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = str(torch.minimum(*values).tolist())
came = str(full["lowest"].tolist())

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-040 shows" if shows else "SP-040 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
