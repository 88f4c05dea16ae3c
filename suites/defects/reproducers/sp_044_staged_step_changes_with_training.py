"""SP-044: 0-dim DTensors are not staged.

    torchrun --standalone --nproc-per-node 1 sp_044_staged_step_changes_with_training.py

BlockingAsyncStager stages an optimizer's step, a DTensor without dimensions, for async_save(); then
training counts on. What was staged has to stay as it was. Needs torch alone. Ends with 0 where
torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
step = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
staged = BlockingAsyncStager().stage({"step": step})["step"]
step += 1
expected = "a staged step of 1.0"
came = f"a staged step of {staged.to_local().item()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-044 shows" if shows else "SP-044 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
