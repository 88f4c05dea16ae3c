"""SP-041: a full state dict loses the memory format channels_last.

    torchrun --standalone --nproc-per-node 2 sp_041_channels_last_is_lost.py

What breaks: the sharded weight of a convolution is channels_last. In the full state dict it has the
  strides of a row-major tensor.
Why: the gather makes a new row-major tensor, and does not look at the strides of the original.
For whom: users who train convolutions in channels_last: code that reads strides, or memory
  directly, meets another layout. The values are right.

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
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
model = nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
model.weight = nn.Parameter(distribute_tensor(model.weight, mesh, [Shard(0)]))
expected = f"strides {model.weight.stride()}"
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
got = f"strides {full['weight'].stride()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-041 shows" if shows else "SP-041 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
