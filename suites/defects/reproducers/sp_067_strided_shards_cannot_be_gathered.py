"""SP-067: get_model_state_dict() refuses to gather some _StridedShard placements.

    torchrun --standalone --nproc-per-node 2 sp_067_strided_shards_cannot_be_gathered.py

What breaks: a weight is sharded by columns and flattened, so each rank holds two pieces of it, a
  _StridedShard. The full state dict raises.
Why: redistribute() of torch before 2.12 supports only those split factors that later mesh
  dimensions produce.
For whom: users of torch before 2.12 whose DTensors have such placements. _StridedShard is a private
  class.

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
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
    got = f"a weight of {state['weight'].tolist()}"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-067 shows" if shows else "SP-067 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
