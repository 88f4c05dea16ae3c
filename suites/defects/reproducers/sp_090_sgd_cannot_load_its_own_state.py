"""SP-090: SGD without momentum cannot load the state dict that it gave.

    torchrun --standalone --nproc-per-node 2 sp_090_sgd_cannot_load_its_own_state.py

What breaks: SGD without momentum keeps no state. set_optimizer_state_dict() of its full state dict
  raises "Expected device to be set". Where one group has momentum and another has not, it raises
  "Missing optimizer state". Two optimizers without momentum cannot load what both gave, either.
Why: torch looks for a tensor of the optimizer's state to learn the device, wants state for each
  parameter that trains, and takes an empty state for one that needs no splitting.
For whom: users of SGD without momentum, in all groups or in some.

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


def momentum_in_one_group(model):
    return torch.optim.SGD([{"params": model.weight, "momentum": 0.5}, {"params": model.bias}], 0.5)


ways = {
    "full": (lambda model: torch.optim.SGD(model.parameters(), 0.5), True),
    "groups": (momentum_in_one_group, False),
    "two": (lambda model: [torch.optim.SGD([p], 0.5) for p in model.parameters()], False),
}
expected = "full: loaded, groups: loaded, two: loaded"
said = []
for name, (make, full) in ways.items():
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    optimizers = make(model)
    model(torch.ones(1, 4)).sum().backward()
    for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
        optimizer.step()
    options = StateDictOptions(full_state_dict=full)
    try:
        state = get_optimizer_state_dict(model, optimizers, options=options)
        set_optimizer_state_dict(model, optimizers, state, options=options)
        said.append(f"{name}: loaded")
    except Exception as error:
        said.append(f"{name}: {type(error).__name__}: {str(error)[:60]}")
got = ", ".join(said)

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-090 shows" if shows else "SP-090 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
