"""SP-077: a strict load of an incomplete full state dict passes.

    torchrun --standalone --nproc-per-node 2 sp_077_strict_load_of_a_part_passes.py

What breaks: a full state dict lacks the bias of a sharded model, and strict=True. The load raises
  nothing, and the bias keeps its old values.
Why: torch fills missing keys with the model's own parameters before it checks for missing keys.
For whom: users who load a checkpoint into fully_shard: a renamed or lost key leaves random weights.

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

model = nn.Linear(4, 4)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
expected = "an error that names 'bias'"
try:
    set_model_state_dict(
        model,
        {"weight": torch.ones(4, 4)},
        options=StateDictOptions(full_state_dict=True, strict=True),
    )
    got = "no error, and a bias that was not loaded"
except Exception as error:
    got = expected if "bias" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-077 shows" if shows else "SP-077 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
