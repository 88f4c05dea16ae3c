"""SP-036: a model on ranks 2 and 3 alone gets no full state dict on the CPU.

    torchrun --standalone --nproc-per-node 4 sp_036_nobody_gets_the_result.py

The mesh of the model is [2, 3]. These two ranks take a full state dict with cpu_offload=True, which
is for rank 0 alone. Ranks 0 and 1 have no part. Needs torch alone. Ends with 0 where torch is
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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = DeviceMesh("cpu", [2, 3])
expected = "the weight on a rank that called"
came = expected
if rank >= 2:
    model = nn.Linear(1, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 1), mesh, [Shard(0)]))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    try:
        held = [False, False]
        mine = "weight" in get_model_state_dict(model, options=options)
        dist.all_gather_object(held, mine, group=mesh.get_group())
        came = expected if any(held) else "nothing on either rank"
    except Exception as error:
        came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-036 shows" if shows else "SP-036 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
