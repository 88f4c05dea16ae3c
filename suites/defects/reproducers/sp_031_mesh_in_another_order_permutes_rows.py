"""SP-031: a load from rank 0 permutes weights when the mesh lists its ranks out of order.

    torchrun --standalone --nproc-per-node 2 sp_031_mesh_in_another_order_permutes_rows.py

What breaks: fully_shard over the mesh [1, 0]. A full state dict that rank 0 has is loaded, and each
  rank gets the rows of the other: the model computes something else.
Why: torch sorts the ranks when it makes the mesh's process group, and fully_shard trains in the
  order of the group. The load cuts by the coordinate, which is that of the mesh.
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(1, 4, bias=False)
fully_shard(model, mesh=DeviceMesh("cpu", [1, 0]))
options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
full = {"weight": torch.arange(4.0).unsqueeze(1)}
set_model_state_dict(model, full if rank == 0 else {}, options=options)
with torch.no_grad():
    output = model(torch.ones(1, 1))
expected = "output [0.0, 1.0, 2.0, 3.0]"
got = f"output {output.flatten().tolist()}"

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
