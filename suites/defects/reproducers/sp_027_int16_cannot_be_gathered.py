"""SP-027: a dtype that Gloo does not know cannot be saved in full.

    torchrun --standalone --nproc-per-node 2 sp_027_int16_cannot_be_gathered.py

A model has a sharded buffer of int16. A full state dict is taken. Needs torch alone. Ends with 0
where torch is right, with 1 where not.
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
from torch.distributed.tensor import DTensor, Shard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

rows = torch.full((2,), rank, dtype=torch.int16)
model = nn.Linear(2, 2)
mesh = init_device_mesh("cpu", (size,))
model.register_buffer("codes", DTensor.from_local(rows, mesh, [Shard(0)]))
expected = "codes of [0, 0, 1, 1]"
try:
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    came = f"codes of {full['codes'].tolist()}"
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-027 shows" if shows else "SP-027 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
