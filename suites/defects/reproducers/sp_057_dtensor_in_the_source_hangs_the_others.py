"""SP-057: a value that rank 0 cannot broadcast makes the other ranks hang.

    torchrun --standalone --nproc-per-node 2 sp_057_dtensor_in_the_source_hangs_the_others.py

What breaks: rank 0's full state dict holds a DTensor instead of a plain tensor, as after a
  forgotten full_tensor(). Rank 0 raises, and rank 1 waits until the timeout of the collective, here
  5 s.
Why: rank 0 finds the value inside its own collective, when the other ranks already wait for the
  broadcast. Nobody tells them.
For whom: users who load with broadcast_from_rank0=True: the job hangs, and no error names the key.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

weight = distribute_tensor(torch.ones(3, 3), init_device_mesh("cpu", (size,)), [Replicate()])
model = torch.nn.Linear(3, 3, bias=False)
expected = "an error that names 'weight'"
try:
    set_model_state_dict(
        model,
        {"weight": weight} if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    got = "no error"
except Exception as error:
    named = "weight" in str(error)
    got = expected if named else f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-057 shows" if shows else "SP-057 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
