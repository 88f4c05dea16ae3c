"""SP-047: staging copies the gradient of each sharded parameter.

    torchrun --standalone --nproc-per-node 1 sp_047_staged_parameters_have_gradients.py

What breaks: BlockingAsyncStager stages the sharded parameters of a model after a backward, for
  async_save(). The staged weight has a gradient.
Why: to make a CPU buffer, torch calls copy.deepcopy() on the whole DTensor, with its gradient, and
  then replaces only its local tensor.
For whom: users of async_save() who pass parameters: staging takes twice the time and memory.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(2, 2, bias=False)
distribute_module(model, init_device_mesh("cpu", (size,)))
for param in model.parameters():
    param.grad = torch.ones_like(param)
staged = BlockingAsyncStager().stage(dict(model.named_parameters()))
expected = "a staged weight without a gradient"
got = f"a staged weight {'without' if staged['weight'].grad is None else 'with'} a gradient"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-047 shows" if shows else "SP-047 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
