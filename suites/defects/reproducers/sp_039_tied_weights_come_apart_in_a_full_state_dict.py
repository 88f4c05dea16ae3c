"""SP-039: a full state dict unties tied weights.

    torchrun --standalone --nproc-per-node 2 sp_039_tied_weights_come_apart_in_a_full_state_dict.py

What breaks: the output layer uses the sharded weight of the embedding. The full state dict holds
  two tensors with separate memory.
Why: the gather runs once for each name. Nobody looks whether the tensor was gathered before under
  another name.
For whom: users who save models with a tied embedding: gathering and the checkpoint take twice the
  memory.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

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
model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Shard(0)]))
model[1].weight = model[0].weight
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "two names of one tensor"
tied = full["0.weight"].data_ptr() == full["1.weight"].data_ptr()
got = expected if tied else "two tensors with separate memory"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-039 shows" if shows else "SP-039 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
