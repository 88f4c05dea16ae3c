"""SP-098: _unflatten_tensor() forgets that a weight is cut by the last mesh dimension first.

    torchrun --standalone --nproc-per-node 4 sp_098_shard_order_is_forgotten.py

What breaks: a weight of 8 rows lies over two by two ranks, cut over the second mesh dimension
  first. It is flattened and unflattened, and the DTensor says that the first mesh dimension comes
  first. full_tensor() mixes its rows.
Why: the function hands mesh and placements to DTensor.from_local(), which takes no shard_order.
For whom: authors of frameworks who call the private function on weights in such an order.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, ShardOrderEntry, TensorMeta
from torch.distributed.tensor.parallel._data_parallel_utils import (
    _flatten_tensor,
    _unflatten_tensor,
)

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2))
first, second = divmod(rank, 2)
whole = torch.arange(8.0)
mine = whole.chunk(2)[second].chunk(2)[first].clone()
meta = TensorMeta(whole.shape, whole.stride(), whole.dtype)
order = (ShardOrderEntry(tensor_dim=0, mesh_dims=(1, 0)),)
spec = DTensorSpec(mesh, (Shard(0), Shard(0)), tensor_meta=meta, shard_order=order)
weight = DTensor(mine, spec, requires_grad=False)
expected = f"rows {whole.tolist()}"
try:
    with torch.no_grad():
        got = f"rows {_unflatten_tensor(*_flatten_tensor(weight)).full_tensor().tolist()}"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-098 shows" if shows else "SP-098 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
