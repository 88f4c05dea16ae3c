"""SP-002: a full state dict under TP x DDP holds this rank's shard as the whole tensor.

    torchrun --standalone --nproc-per-node 4 sp_002_full_state_dict_holds_a_shard.py

What breaks: a weight of 16 rows is sharded over 2 ranks, 8 rows each, and DDP wraps the model.
  get_model_state_dict(full_state_dict=True) returns 8 rows.
Why: DDP's hooks turn each DTensor into a plain local tensor between forwards. A state dict cannot
  tell this local tensor from a whole weight.
For whom: users who save a model with tensor parallelism inside DDP: the file that rank 0 writes
  holds only rank 0's shards.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "a weight of shape (16, 8)"
got = f"a weight of shape {tuple(full['0.weight'].shape)}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-002 shows" if shows else "SP-002 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
