"""SP-099: FSDP1 in a pipeline stage mixes the stages in its own sharded state dict.

    torchrun --standalone --nproc-per-node 4 sp_099_fsdp1_mixes_pipeline_stages.py

What breaks: two stages of a pipeline, each under FSDP1 over its two ranks, on a mesh of the
  dimensions ("pp", "dp"). A sharded state dict is got and set again at once. Both stages have the
  upper rows of stage 0 and the lower rows of stage 1.
Why: _chunk_dtensor shards over the first dimension of the root mesh, whichever FSDP's is, and
  _all_gather_dtensor gathers over all but the last one.
For whom: users who train a pipeline of FSDP1 stages without tensor parallelism.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
stage = mesh.get_local_rank("pp")
model = nn.Sequential(nn.Linear(1, 4, bias=False))
with torch.no_grad():
    model[0].weight.copy_(torch.arange(4.0).unsqueeze(1) + 10 * stage)
cpu = torch.device("cpu")
wrapped = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], use_orig_params=True, device_id=cpu
)
set_model_state_dict(wrapped, get_model_state_dict(wrapped))
with torch.no_grad():
    output = wrapped(torch.ones(1, 1))
expected = f"output {[row + 10.0 * stage for row in range(4)]}"
got = f"output {output.flatten().tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", f"expected {expected}; got {got}")
store.set(f"shows {rank}", str(got != expected))
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(store.get(f"shows {r}") == b"True" for r in range(size))
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: {answer}")
    print("SP-099 shows" if shows else "SP-099 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
