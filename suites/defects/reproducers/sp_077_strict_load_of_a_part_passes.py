"""SP-077: keys that a full state dict lacks are filled up with the model's own parameters.

    torchrun --standalone --nproc-per-node 2 sp_077_strict_load_of_a_part_passes.py

A full state dict lacks the bias of a sharded model, and strict loading is asked for, which is the
default. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
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

model = nn.Linear(4, 4)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
expected = "an error that names 'bias'"
try:
    set_model_state_dict(
        model,
        {"weight": torch.ones(4, 4)},
        options=StateDictOptions(full_state_dict=True, strict=True),
    )
    came = "no error, and a bias that was not loaded"
except Exception as error:
    came = expected if "bias" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-077 shows" if shows else "SP-077 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
