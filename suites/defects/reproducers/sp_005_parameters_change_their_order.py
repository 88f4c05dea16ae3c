"""SP-005: DDP changes the order of a module's parameters under tensor parallelism.

    torchrun --standalone --nproc-per-node 4 sp_005_parameters_change_their_order.py

What breaks: a layer has a sharded weight and a bias that is not sharded. named_parameters() lists
  the bias first once DDP has wrapped the layer.
Why: DDP replaces the sharded weight by delattr() and setattr(), which move it to the end of the
  module's parameters.
For whom: users who load optimizer.state_dict(): it numbers parameters in the order of the model, so
  a state from before DDP reaches the wrong parameters.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Linear(8, 8)
model.weight = nn.Parameter(distribute_tensor(model.weight, mesh["tp"], [Shard(0)]))
expected = "the order " + ", ".join(name for name, _ in model.named_parameters())
DistributedDataParallel(model, device_mesh=mesh["dp"])
got = "the order " + ", ".join(name for name, _ in model.named_parameters())

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-005 shows" if shows else "SP-005 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
