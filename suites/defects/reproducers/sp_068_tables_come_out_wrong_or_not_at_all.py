"""SP-068: tables of LocalShardsWrapper come out wrong, or cannot be gathered or staged.

    torchrun --standalone --nproc-per-node 2 sp_068_tables_come_out_wrong_or_not_at_all.py

A table of 64-bit ids lies as torchrec lays tables: what a rank has of it, one shard of rows or
several of columns, is in a LocalShardsWrapper, a class of a private module of torch.
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

mesh = init_device_mesh("cpu", (size,))
full = 2**40 + torch.arange(8).reshape(2, 4)
layouts = {  # the dimension that is sharded, and where the shards of this rank begin and end
    "rows": (0, [(rank, rank + 1)]),
    "columns": (1, [(2 * rank, 2 * rank + 1), (2 * rank + 1, 2 * rank + 2)]),
}
told = []
for name, (dim, cuts) in layouts.items():
    shards = [full.narrow(dim, first, last - first).clone() for first, last in cuts]
    offsets = [(first, 0) if dim == 0 else (0, first) for first, _ in cuts]
    table = DTensor.from_local(
        LocalShardsWrapper(shards, offsets),
        mesh,
        [Shard(dim)],
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )
    model = nn.Module()
    model.register_buffer("table", table)
    try:
        got = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))["table"]
        good = got.shape == full.shape and got.tolist() == full.tolist()
        told.append(f"{name}: {'the table' if good else got.tolist()}")
    except Exception as error:
        told.append(f"{name}: {type(error).__name__}: {str(error)[:60]}")
expected = "rows: the table; columns: the table"
came = "; ".join(told)

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
