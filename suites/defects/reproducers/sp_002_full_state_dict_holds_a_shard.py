"""SP-002: a full state dict under TP x DDP holds this rank's shard as the whole tensor.

    torchrun --standalone --nproc-per-node 4 sp_002_full_state_dict_holds_a_shard.py

A weight of 16 rows lies on 2 ranks of tensor parallelism, under DDP. Its full state dict is taken
as for a checkpoint. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "a weight of shape (16, 8)"
came = f"a weight of shape {tuple(full['0.weight'].shape)}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-002 shows" if shows else "SP-002 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
