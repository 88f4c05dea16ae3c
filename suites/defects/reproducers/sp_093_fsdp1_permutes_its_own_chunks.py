"""SP-093: FSDP1 over tensor parallelism permutes its own sharded state dict on an unsorted mesh.

    torchrun --standalone --nproc-per-node 2 sp_093_fsdp1_permutes_its_own_chunks.py

What breaks: a model under FSDP1 and tensor parallelism over a mesh that lists rank 1 before rank 0.
  Its sharded state dict is got and set again at once. Each rank's rows are those of the other.
Why: _chunk_dtensor cuts the tensor by the coordinate on the mesh. _all_gather_dtensor puts the
  chunks together in the order of the group, whose ranks torch sorts.
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
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = DeviceMesh("cpu", [[1], [0]], mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(1, 4, bias=False))
with torch.no_grad():
    model[0].weight.copy_(torch.arange(4.0).unsqueeze(1))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
cpu = torch.device("cpu")
wrapped = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], use_orig_params=True, device_id=cpu
)
set_model_state_dict(wrapped, get_model_state_dict(wrapped))
with torch.no_grad():
    output = wrapped(torch.ones(1, 1))
expected = "output [0.0, 1.0, 2.0, 3.0]"
got = f"output {output.flatten().tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-093 shows" if shows else "SP-093 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
