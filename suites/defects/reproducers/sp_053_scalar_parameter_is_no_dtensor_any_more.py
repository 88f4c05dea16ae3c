"""SP-053: loading a full state dict replaces a 0-dim DTensor by a plain CPU tensor.

    torchrun --standalone --nproc-per-node 2 sp_053_scalar_parameter_is_no_dtensor_any_more.py

What breaks: a model on meta has a weight and a 0-dim scale, both DTensors. After a broadcast load
  the scale is no DTensor.
Why: torch sends a 0-dim value as a Python object, and puts it into the state dict without looking
  at the target.
For whom: users with 0-dim sharded parameters or optimizer steps: mesh, placement and device are
  lost, and a later operator may refuse to mix the two types.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

with torch.device("meta"):
    model = nn.Linear(2, 2, bias=False)
    model.scale = nn.Parameter(torch.tensor(1.0))
distribute_module(model, init_device_mesh("cpu", (size,)))
full = {"weight": torch.ones(2, 2), "scale": torch.tensor(3.0)}
set_model_state_dict(
    model,
    full if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = "DTensor weight, DTensor scale"
got = ", ".join(
    f"{'DTensor' if isinstance(param.data, DTensor) else 'plain tensor'} {name}"
    for name, param in model.named_parameters()
)

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-053 shows" if shows else "SP-053 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
