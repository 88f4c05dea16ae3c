"""SP-100: entries that only the checkpoint has are broadcast to rank 0 alone.

    torchrun --standalone --nproc-per-node 2 sp_100_entries_of_the_checkpoint_reach_rank_0.py

What breaks: an optimizer keeps the last gradients of each weight in a list, which is empty in a new
  one. Its state dict is loaded with broadcast_from_rank0. The list has its gradient on rank 0, and
  is empty or gone on rank 1, so replicas that were alike train apart, or fail.
Why: _load_optim_state_dict broadcasts to the keys that the new optimizer has on each rank. What the
  checkpoint has beside them is added from the state dict that was given, which is empty elsewhere.
For whom: users of optimizers whose state grows while they train, such as windows of gradients, who
  resume with broadcast_from_rank0.

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


class Window(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.5})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            state["last"] = param.grad.clone()
            window = state.setdefault("window", [])
            if param.grad.any():
                window.append(param.grad.clone())


store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(2, 1, bias=False)
old, new = Window(model.parameters()), Window(model.parameters())
model(torch.ones(1, 2)).sum().backward()
old.step()
model.zero_grad()
saved = get_optimizer_state_dict(model, old, options=StateDictOptions(full_state_dict=True))
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
set_optimizer_state_dict(model, new, saved if rank == 0 else {}, options=options)
window = new.state[model.weight].get("window", ())
expected = "1 gradient"
got = f"{len(window)} gradient{'s' * (len(window) != 1)}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", f"expected {expected}; got {got}")
store.set(f"shows {rank}", str(got != expected))
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(store.get(f"shows {r}") == b"True" for r in range(size))
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: {answer}")
    print("SP-100 shows" if shows else "SP-100 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
