"""SP-003: a frozen tensor-parallel weight becomes trainable when DDP wraps the model.

    torchrun --standalone --nproc-per-node 4 sp_003_frozen_weight_starts_to_train.py

What breaks: the first layer is frozen, as under an adapter. After DDP has wrapped the model,
  requires_grad of the frozen weights is True.
Why: the private function _flatten_tensor() calls requires_grad_() on each local tensor, and does
  not ask whether the DTensor requires grad.
For whom: users who fine-tune adapters with tensor parallelism inside DDP or FSDP1: the optimizer
  changes the frozen base model.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
model[0].requires_grad_(False)
expected = "trainable: " + ", ".join(n for n, p in model.named_parameters() if p.requires_grad)
DistributedDataParallel(model, device_mesh=mesh["dp"])
got = "trainable: " + ", ".join(n for n, p in model.named_parameters() if p.requires_grad)

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-003 shows" if shows else "SP-003 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
