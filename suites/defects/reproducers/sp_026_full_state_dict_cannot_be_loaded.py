"""SP-026: FSDP1 over tensor parallelism cannot load its own full state dict.

    torchrun --standalone --nproc-per-node 4 sp_026_full_state_dict_cannot_be_loaded.py

What breaks: the full state dict of a model is taken, and loaded into the same model. The load
  raises.
Why: torch replaces FSDP1's sharded targets by whole tensors. FSDP1's load hook expects shards
  beside the DTensors of tensor parallelism, and the shapes do not fit.
For whom: users who resume FSDP1 over tensor parallelism from a full state dict.

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
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
options = StateDictOptions(full_state_dict=True)
full = get_model_state_dict(model, options=options)
expected = "a load without an error"
try:
    set_model_state_dict(model, full, options=options)
    got = expected
except Exception as error:
    got = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-026 shows" if shows else "SP-026 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
