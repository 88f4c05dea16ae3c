"""SP-027: int16 and other dtypes that Gloo does not support cannot be saved in full.

    torchrun --standalone --nproc-per-node 2 sp_027_int16_cannot_be_gathered.py

What breaks: a model has a sharded buffer of int16. get_model_state_dict(full_state_dict=True)
  raises 'Invalid scalar type'.
Why: the tensor itself is handed to Gloo's all-gather, which knows no int16. Its bytes could travel
  as uint8.
For whom: users who save int16, uint16, uint32, uint64 or float8 tensors, such as quantized weights,
  over Gloo.

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

rows = torch.full((2,), rank, dtype=torch.int16)
model = nn.Linear(2, 2)
mesh = init_device_mesh("cpu", (size,))
model.register_buffer("codes", DTensor.from_local(rows, mesh, [Shard(0)]))
expected = "a buffer of [0, 0, 1, 1]"
try:
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    got = f"a buffer of {full['codes'].tolist()}"
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-027 shows" if shows else "SP-027 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
