"""SP-095: set_state_dict() broadcasts the model to ranks that do not listen.

    torchrun --standalone --nproc-per-node 2 sp_095_model_is_broadcast_to_nobody.py

What breaks: rank 0 has the full state dict of a model, the other ranks have {}. With
  broadcast_from_rank0 set_state_dict() returns on the other ranks at once, and their weights stay.
  Rank 0 hangs in the broadcast.
Why: a rank whose model state dict is empty is taken to load an optimizer alone.
For whom: users who read a checkpoint on rank 0 alone, and set model and optimizer in one call.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(2, 2, bias=False)
optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
weights, moments = get_state_dict(model, optimizer)
weights["weight"] = torch.ones(2, 2)
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
expected = "the weights of rank 0"
try:
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights if rank == 0 else {},
        optim_state_dict=moments if rank == 0 else {},
        options=options,
    )
    alike = torch.equal(model.weight.detach(), torch.ones(2, 2))
    got = expected if alike else "no error, and the weights from before"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-095 shows" if shows else "SP-095 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
