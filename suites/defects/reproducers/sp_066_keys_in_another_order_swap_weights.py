"""SP-066: loading a full state dict swaps weights when ranks list their keys in different orders.

    torchrun --standalone --nproc-per-node 2 sp_066_keys_in_another_order_swap_weights.py

What breaks: each rank has the full state dict of a sharded model, and rank 1 lists its keys in
  reverse. Rank 1 gets the rows of the wrong weights.
Why: although every rank has every tensor, rank 0 scatters them one by one in its own order. Rank 1
  receives them in rank 1's order.
For whom: users who load full_state_dict=True on every rank from files or dicts that list keys
  differently.

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
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
full = {"0.weight": torch.zeros(2, 2), "1.weight": torch.ones(2, 2)}
if rank == 1:
    full = dict(reversed(full.items()))
set_model_state_dict(model, full, options=StateDictOptions(full_state_dict=True))
expected = "rows of 0.0 in 0.weight, of 1.0 in 1.weight"
rows = [layer.weight.to_local().mean().item() for layer in model]
got = f"rows of {rows[0]} in 0.weight, of {rows[1]} in 1.weight"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-066 shows" if shows else "SP-066 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
