"""SP-063: a broadcast load takes more than one collective for each tensor.

    torchrun --standalone --nproc-per-node 2 sp_063_each_tensor_is_a_broadcast_of_its_own.py

What breaks: rank 0 broadcasts a full state dict of 20 small layers into a model. The load runs at
  least 20 collectives.
Why: torch broadcasts each tensor as soon as it meets it, and does not put small tensors into one
  buffer.
For whom: users who load models with many small tensors: the latency of the network dominates the
  time.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor.debug import CommDebugMode

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(20)])
full = {f"{layer}.weight": torch.ones(2, 2) for layer in range(20)}
with CommDebugMode() as counted:
    set_model_state_dict(
        model,
        full if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
expected = "fewer than 20 collectives for 20 tensors"
number = counted.get_total_counts()
got = expected if number < 20 else f"{number} collectives for 20 tensors"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-063 shows" if shows else "SP-063 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
