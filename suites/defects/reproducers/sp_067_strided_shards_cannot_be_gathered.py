"""SP-067: DTensor refuses to gather some _StridedShard placements.

    torchrun --standalone --nproc-per-node 2 sp_067_strided_shards_cannot_be_gathered.py

A weight is sharded by columns and flattened, so that each rank holds two pieces of it: a
_StridedShard, which is a private class. get_model_state_dict() is to give the weight whole. Affects
torch before 2.12. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
full = torch.arange(8.0)
mine = full.reshape(2, 2, 2)[:, rank].flatten()
model = nn.Module()
model.weight = nn.Parameter(
    DTensor.from_local(mine, mesh, [_StridedShard(0, split_factor=2)], run_check=False)
)
expected = f"a weight of {full.tolist()}"
try:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    came = f"a weight of {state['weight'].tolist()}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-067 shows" if shows else "SP-067 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
