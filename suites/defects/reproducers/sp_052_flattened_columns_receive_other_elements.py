"""SP-052: _StridedShard targets, and shards in another order of mesh dimensions, receive other rows.

    torchrun --standalone --nproc-per-node 2 sp_052_flattened_columns_receive_other_elements.py

A weight is sharded by columns and flattened, so that each rank holds two pieces of it, which torch
calls a _StridedShard. Rank 0 broadcasts a full state dict into the model; ranks take one piece that
is as long. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
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
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
model = nn.Module()
model.weight = nn.Parameter(distribute_tensor(torch.zeros(2, 4), mesh, [Shard(1)]).flatten())
set_model_state_dict(
    model,
    {"weight": torch.arange(8.0)} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = f"elements {[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]}"
came = f"elements {model.weight.full_tensor().tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-052 shows" if shows else "SP-052 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
