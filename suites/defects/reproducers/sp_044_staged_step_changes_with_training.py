"""SP-044: staging returns 0-dim DTensors uncopied.

    torchrun --standalone --nproc-per-node 1 sp_044_staged_step_changes_with_training.py

What breaks: BlockingAsyncStager stages an optimizer's step, a 0-dim DTensor, for async_save(). When
  training increments the step, the staged step changes, too.
Why: the function that makes the CPU buffer returns a 0-dim DTensor itself, and no copy of it.
For whom: users who save sharded optimizer states by async_save() while training continues: the step
  in the checkpoint may be too high.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
step = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
staged = BlockingAsyncStager().stage({"step": step})["step"]
step += 1
expected = "a staged step of 1.0"
got = f"a staged step of {staged.to_local().item()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-044 shows" if shows else "SP-044 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
