"""SP-055: loading a full state dict into a model on meta unties its tied weights.

    torchrun --standalone --nproc-per-node 2 sp_055_tied_weights_come_apart.py

What breaks: two layers of a model on meta share one weight. After a broadcast load each layer has
  its own memory.
Why: the load makes a new tensor for each key, and does not look which keys share a tensor.
For whom: users who create models with tied embeddings on meta: the layers train apart.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

with torch.device("meta"):
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
set_model_state_dict(
    model,
    {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = "two layers with one memory"
tied = model[0].weight.data_ptr() == model[1].weight.data_ptr()
got = expected if tied else "two layers with separate memory"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-055 shows" if shows else "SP-055 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
