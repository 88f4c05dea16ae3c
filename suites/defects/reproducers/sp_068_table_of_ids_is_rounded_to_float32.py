"""SP-068: tables of LocalShardsWrapper come out wrong, or cannot be gathered or staged.

    torchrun --standalone --nproc-per-node 2 sp_068_table_of_ids_is_rounded_to_float32.py

A table of 64-bit ids lies as torchrec lays tables: the rows of a rank are in a LocalShardsWrapper,
a class of a private module of torch, which torchrec uses. get_model_state_dict() is to give the
whole table; it gives one of float32, which rounds the ids. Needs torch alone. Ends with 0 where
torch is right, with 1 where not.
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
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

full = torch.tensor([[2**40 + 1], [2**40 + 2]])
shards = LocalShardsWrapper([full[rank : rank + 1].clone()], [(rank, 0)])
mesh = init_device_mesh("cpu", (size,))
table = DTensor.from_local(
    shards, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride()
)
model = nn.Module()
model.register_buffer("table", table)
got = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))["table"]
expected = f"ids {full.flatten().tolist()}"
came = f"ids {got.flatten().tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-068 shows" if shows else "SP-068 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
