"""SP-049: loading an optimizer state turns Adam's betas from a tuple into a list.

    torchrun --standalone --nproc-per-node 2 sp_049_betas_come_back_as_a_list.py

What breaks: a full optimizer state of a sharded model is saved and loaded, and betas=(0.9, 0.999)
  becomes a list.
Why: torch flattens the state to paths such as betas.0 and builds it up again. A path does not
  record whether a container was a tuple or a list, or a key an int or a str.
For whom: users who load optimizer states and compare or hash hyperparameters, or who use int keys
  in nested state dicts.

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

model = nn.Linear(4, 4)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
optimizer = torch.optim.Adam(model.parameters())
options = StateDictOptions(full_state_dict=True)
full = get_optimizer_state_dict(model, optimizer, options=options)
set_optimizer_state_dict(model, optimizer, full, options=options)
expected = "betas (0.9, 0.999)"
got = f"betas {optimizer.param_groups[0]['betas']}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-049 shows" if shows else "SP-049 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
