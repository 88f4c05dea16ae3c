"""SP-026: a full state dict cannot be loaded into FSDP1 over tensor parallelism.

    torchrun --standalone --nproc-per-node 4 sp_026_full_state_dict_cannot_be_loaded.py

The full state dict of a model is taken, and loaded into the same model again. Needs torch alone.
Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
options = StateDictOptions(full_state_dict=True)
full = get_model_state_dict(model, options=options)
expected = "loaded"
try:
    set_model_state_dict(model, full, options=options)
    came = "loaded"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:200]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-026 shows" if shows else "SP-026 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
