"""SP-089: a flat optimizer state is loaded only where the optimizer has state already.

    torchrun --standalone --nproc-per-node 2 sp_089_flat_state_is_loaded_by_what_is_there.py

What breaks: a flat optimizer state is loaded in two ways, and no error is raised. A new optimizer
  of a model that has gradients stays empty. Under FSDP1, where each rank holds one of two weights,
  both get the moments of half of the one and half of the other; where their shapes differ, Gloo
  ends the process.
Why: torch asks the optimizer, not the state dict, which state a parameter has. Under FSDP1 it is
  none for parameters of other ranks, and then each rank gathers another one.
For whom: users who save optimizer states flat, as pipelines need it.

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
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


def sums(optimizer):
    return [state["exp_avg"].sum().item() for state in optimizer.state.values() if state]


flat = StateDictOptions(flatten_optimizer_state_dict=True)
expected = "what was saved"
said = []
for name in ("new optimizer", "FSDP1"):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for number, param in enumerate(model.parameters(), 1):
        nn.init.constant_(param, number)
    if name == "FSDP1":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.5))
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    saved, state = sums(optimizer), get_optimizer_state_dict(model, optimizer, options=flat)
    if name == "new optimizer":
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.5))
    set_optimizer_state_dict(model, optimizer, state, options=flat)
    if sums(optimizer) != saved:
        said.append(f"{name}: sums of moments {sums(optimizer)} instead of {saved}")
got = ", ".join(said) or expected

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-089 shows" if shows else "SP-089 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
