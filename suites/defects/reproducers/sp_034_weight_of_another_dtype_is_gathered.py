"""SP-034: a weight whose dtype differs between ranks is gathered as if it did not.

    torchrun --standalone --nproc-per-node 2 sp_034_weight_of_another_dtype_is_gathered.py

What breaks: rank 0 holds its half of a weight of ones in float16, rank 1 in bfloat16. The full
  weight is not one, and no error is raised.
Why: torch gathers the bytes without comparing dtypes. Both dtypes have 2 bytes, so each rank reads
  the other's bytes as its own dtype.
For whom: users who cast a model differently on one rank by mistake: the checkpoint is corrupt.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
ones = torch.ones(2, 1, dtype=torch.float16 if rank == 0 else torch.bfloat16)
model = nn.Linear(1, 4, bias=False)
model.weight = nn.Parameter(DTensor.from_local(ones, mesh, [Shard(0)]))
expected = "an error that names 'weight', or a weight of ones"
try:
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))["weight"]
    good = bool(full.eq(1).all())
    got = expected if good else f"no error, and a weight of {full.flatten().tolist()}"
except Exception as error:
    got = expected if "weight" in str(error) else f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-034 shows" if shows else "SP-034 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
