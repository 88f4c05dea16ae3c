"""SP-065: simulated ranks cannot load a full state dict.

    torchrun --standalone --nproc-per-node 1 sp_065_simulated_ranks_cannot_load.py

One process plays two ranks, in torch's LocalTensorMode, which lies in a private module. A full
state dict is loaded into a sharded parameter, of which each rank that is played is to get its row.
Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

dist.destroy_process_group()
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))
expected = "the whole weight is [[0.0, 1.0], [2.0, 3.0]]"
try:
    with LocalTensorMode(2):
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)]))
        set_model_state_dict(
            model,
            {"weight": torch.arange(4.0).reshape(2, 2)},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        got = model.weight.full_tensor().reconcile()
    came = f"the whole weight is {got.tolist()}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-065 shows" if shows else "SP-065 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
