"""SP-061: _broadcast_state_dict() cannot write into parameters that require grad.

    torchrun --standalone --nproc-per-node 2 sp_061_trained_target_cannot_be_written.py

What breaks: rank 0 broadcasts a full state dict into a sharded parameter that requires grad, while
  autograd is on. The call raises.
Why: the function writes by copy_() without no_grad(), which autograd refuses for a leaf that
  requires grad.
For whom: callers of this private function. set_model_state_dict() turns autograd off.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._state_dict_utils import _broadcast_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
mine = {"weight": nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)]))}
expected = "a row of [1.0, 1.0] on this rank"
try:
    full = {"weight": torch.ones(2, 2)} if rank == 0 else {}
    _broadcast_state_dict(full, mine, torch.device("cpu"))
    got = f"a row of {mine['weight'].to_local()[0].tolist()} on this rank"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-061 shows" if shows else "SP-061 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
