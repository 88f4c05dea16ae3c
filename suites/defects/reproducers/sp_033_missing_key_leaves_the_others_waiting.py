"""SP-033: a key that one rank lacks makes the other ranks hang.

    torchrun --standalone --nproc-per-node 2 sp_033_missing_key_leaves_the_others_waiting.py

What breaks: rank 1 has no second weight. For a full state dict rank 0 waits for the rows of rank 1
  until the timeout of the collective, here 5 s.
Why: each tensor is gathered in its own collective. Nobody compares the keys of the ranks first.
For whom: users whose model differs between ranks by mistake: the job hangs, and no error names the
  key.

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
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
model = nn.Module()
for name in ("ones", "twos"):
    weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    if name == "ones" or rank == 0:
        model.register_parameter(name, weight)
expected = "an error that names 'twos'"
try:
    get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    got = "no error"
except Exception as error:
    got = expected if "twos" in str(error) else f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-033 shows" if shows else "SP-033 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
