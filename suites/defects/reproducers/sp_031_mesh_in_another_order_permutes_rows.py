"""SP-031: a full state dict permutes rows when the mesh lists its ranks out of order.

    torchrun --standalone --nproc-per-node 2 sp_031_mesh_in_another_order_permutes_rows.py

What breaks: the mesh is [1, 0], so rank 1 holds the first rows of the weight and rank 0 the last.
  The full state dict puts rank 0's rows first.
Why: torch sorts the ranks when it makes the mesh's process group, and gathers in the order of the
  group. The placements mean the order of the mesh.
For whom: users who build a DeviceMesh whose ranks are not in rising order, for example to follow
  the network's topology.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = DeviceMesh("cpu", [1, 0])
rows = torch.arange(4.0).unsqueeze(1).chunk(2)[mesh.get_coordinate()[0]]
model = nn.Linear(1, 4, bias=False)
model.weight = nn.Parameter(DTensor.from_local(rows, mesh, [Shard(0)]))
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "rows [0.0, 1.0, 2.0, 3.0]"
got = f"rows {full['weight'].flatten().tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-031 shows" if shows else "SP-031 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
