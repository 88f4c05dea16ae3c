"""SP-076: a full, flattened optimizer state cannot be loaded.

    torchrun --standalone --nproc-per-node 2 sp_076_flat_optimizer_state_cannot_be_loaded.py

What breaks: get_optimizer_state_dict() saves with full_state_dict and flatten_optimizer_state_dict.
  set_optimizer_state_dict() with the same options raises KeyError.
Why: torch unflattens the state that it loads, but compares it with the model's own state in
  flattened form.
For whom: users who save flattened optimizer states, as needed to change the number of pipeline
  stages.

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
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(4, 4, bias=False)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
optimizer = torch.optim.Adam(model.parameters())
options = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
full = get_optimizer_state_dict(model, optimizer, options=options)
expected = "a load without an error"
try:
    set_optimizer_state_dict(model, optimizer, full, options=options)
    got = expected
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-076 shows" if shows else "SP-076 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
