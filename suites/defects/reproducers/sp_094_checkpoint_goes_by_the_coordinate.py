"""SP-094: a checkpoint of a mesh that lists its ranks out of order is permuted on any other mesh.

    torchrun --standalone --nproc-per-node 2 sp_094_checkpoint_goes_by_the_coordinate.py

What breaks: a model of fully_shard over ranks [1, 0] is saved with torch.distributed.checkpoint,
  and loaded into a plain model. The last rows of the weight stand before the first ones.
Why: the offsets of a shard in the file go by the rank's coordinate in the mesh. fully_shard cuts by
  the rank's number in the group, whose ranks torch sorts.
For whom: users whose meshes follow the network's topology, and who load on another number of ranks,
  or export a model.

Needs a local file system that both ranks see.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(1, 4, bias=False)
with torch.no_grad():
    model.weight.copy_(torch.arange(4.0).unsqueeze(1))
fully_shard(model, mesh=DeviceMesh("cpu", [1, 0]))
loaded = {"weight": torch.zeros(4, 1)}
with tempfile.TemporaryDirectory() as own:
    folder = [own]
    dist.broadcast_object_list(folder)
    dcp.save(model.state_dict(), checkpoint_id=folder[0])
    dcp.load(loaded, checkpoint_id=folder[0])
    dist.barrier()  # rank 0 removes the folder
expected = "a weight of [0.0, 1.0, 2.0, 3.0]"
got = f"a weight of {loaded['weight'].flatten().tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-094 shows" if shows else "SP-094 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
