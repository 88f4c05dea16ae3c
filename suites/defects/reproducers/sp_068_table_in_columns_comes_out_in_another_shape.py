"""SP-068: tables of LocalShardsWrapper come out wrong, or cannot be gathered or staged.

    torchrun --standalone --nproc-per-node 2 sp_068_table_in_columns_comes_out_in_another_shape.py

An embedding table of 4 rows and 6 columns lies as torchrec lays it: each rank has three columns, as
two shards in one LocalShardsWrapper, a private class of torch that torchrec uses.
get_model_state_dict() is to give the whole table. Needs torch alone. Ends with 0 where torch is
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
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

full = torch.arange(24.0).reshape(4, 6)
first = 3 * rank
shards = [full[:, first : first + 1].clone(), full[:, first + 1 : first + 3].clone()]
held = LocalShardsWrapper(shards, [(0, first), (0, first + 1)])
mesh = init_device_mesh("cpu", (size,))
table = DTensor.from_local(
    held, mesh, [Shard(1)], run_check=False, shape=full.shape, stride=full.stride()
)
model = nn.Module()
model.register_buffer("table", table)
expected = f"a table of {full.tolist()}"
try:
    got = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))["table"]
    came = f"a table of {got.tolist()}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

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
