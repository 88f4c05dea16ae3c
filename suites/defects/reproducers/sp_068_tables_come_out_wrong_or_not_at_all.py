"""SP-068: tables of LocalShardsWrapper are gathered with wrong values, or cannot be gathered.

    torchrun --standalone --nproc-per-node 2 sp_068_tables_come_out_wrong_or_not_at_all.py

What breaks: a table of 64-bit ids is sharded by rows, and another by columns, as torchrec does it.
  The full state dict holds other ids, or raises.
Why: a LocalShardsWrapper reports the dtype float32, whatever its shards hold. It lacks some
  operators of a gather, and joins several shards as if they were rows.
For whom: users of torchrec who save sharded embedding tables. LocalShardsWrapper is in a private
  module.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
full = 2**40 + torch.arange(8).reshape(2, 4)
layouts = {  # the sharded dimension, and where each shard of this rank begins and ends
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
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))["table"]
        good = whole.shape == full.shape and whole.tolist() == full.tolist()
        wrong = f"{whole.dtype} of shape {tuple(whole.shape)} with other ids"
        told.append(f"{name}: {'the whole table' if good else wrong}")
    except Exception as error:
        told.append(f"{name}: {type(error).__name__}: {str(error).partition('. ')[0]}")
expected = "rows: the whole table; columns: the whole table"
got = "; ".join(told)

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-068 shows" if shows else "SP-068 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
