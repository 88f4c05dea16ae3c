"""SP-035: a full state dict takes one collective for each tensor.

    torchrun --standalone --nproc-per-node 2 sp_035_collective_for_each_tensor.py

What breaks: a model has 20 small sharded weights. A full state dict runs 20 collectives.
Why: torch gathers each tensor on its own, and does not put small tensors into one buffer.
For whom: users who save models with many small tensors: the latency of the network dominates the
  time.

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
from torch.distributed.tensor.debug import CommDebugMode

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
weights = [distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]) for _ in range(20)]
model = nn.ParameterList(weights)
with CommDebugMode() as seen:
    get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
count = seen.get_total_counts()
expected = "fewer than 20 collectives for 20 tensors"
got = expected if count < 20 else f"{count} collectives for 20 tensors"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-035 shows" if shows else "SP-035 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
