"""SP-069: the optimizer state of a model under TP x DDP holds this rank's shard as the whole.

    torchrun --standalone --nproc-per-node 4 sp_069_optimizer_state_holds_a_shard_as_the_whole.py

What breaks: a weight of 16 rows is sharded over 2 ranks, 8 rows each, and DDP wraps the model. The
  full optimizer state holds moments of 8 rows.
Why: the optimizer holds DDP's plain local tensors. Nothing marks their moments as shards of larger
  tensors.
For whom: users who save the optimizer of a model with tensor parallelism inside DDP: the file holds
  the moments of one shard only.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = DistributedDataParallel(model, device_mesh=mesh["dp"])
optimizer = torch.optim.Adam(model.parameters())
options = StateDictOptions(full_state_dict=True)
moments = get_optimizer_state_dict(model, optimizer, options=options)["state"]["0.weight"]
expected = "moments of shape (16, 8)"
got = f"moments of shape {tuple(moments['exp_avg'].shape)}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-069 shows" if shows else "SP-069 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
