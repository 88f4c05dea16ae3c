"""SP-034: ranks that hold a weight with another dtype are gathered together.

    torchrun --standalone --nproc-per-node 2 sp_034_weight_of_another_dtype_is_gathered.py

Rank 0 holds its half of a weight of ones in float16, rank 1 in bfloat16. A full state dict is
taken. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
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

mesh = init_device_mesh("cpu", (size,))
ones = torch.ones(2, 1, dtype=torch.float16 if rank == 0 else torch.bfloat16)
model = nn.Linear(1, 4, bias=False)
model.weight = nn.Parameter(DTensor.from_local(ones, mesh, [Shard(0)]))
expected = "an error that names 'weight', or a weight of ones"
try:
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))["weight"]
    came = expected if bool(full.eq(1).all()) else f"a weight of {full.flatten().tolist()}"
except Exception as error:
    came = expected if "weight" in str(error) else f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-034 shows" if shows else "SP-034 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
