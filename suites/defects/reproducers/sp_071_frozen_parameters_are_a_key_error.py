"""SP-071: ignore_frozen_params raises KeyError for a full state dict of FSDP1.

    torchrun --standalone --nproc-per-node 2 sp_071_frozen_parameters_are_a_key_error.py

What breaks: an FSDP1 model has a frozen bias. A full state dict on rank 0 without frozen parameters
  is asked for, and all other ranks raise KeyError.
Why: torch removes the frozen keys on every rank, but FSDP1 fills the state dict only on rank 0.
For whom: users who save only the trained parameters, such as adapters, under FSDP1.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

linear = nn.Linear(4, 4)
linear.bias.requires_grad_(False)
model = FullyShardedDataParallel(linear, device_id=torch.device("cpu"), use_orig_params=True)
# Rank 0 gets the same result without cpu_offload, with which torch before 2.14 crashes (SP-070).
expected = "a weight on rank 0, nothing elsewhere"
try:
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=rank > 0, ignore_frozen_params=True
    )
    state = get_model_state_dict(model, options=options)
    got = expected if list(state) == ["weight"] * (rank == 0) else f"{list(state)}"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-071 shows" if shows else "SP-071 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
