"""SP-033: a weight that one rank lacks leaves the other ranks waiting.

    torchrun --standalone --nproc-per-node 2 sp_033_missing_key_leaves_the_others_waiting.py

Rank 1 has not added its second weight. A full state dict is taken, and rank 0 waits for the rows of
rank 1 until the timeout of the collective, here 5 s. Needs torch alone. Ends with 0 where torch is
right, with 1 where not.
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
model = nn.Module()
for name in ("ones", "twos"):
    weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    if name == "ones" or rank == 0:
        model.register_parameter(name, weight)
expected = "an error that names 'twos'"
try:
    get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    came = "no error"
except Exception as error:
    came = expected if "twos" in str(error) else f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-033 shows" if shows else "SP-033 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
