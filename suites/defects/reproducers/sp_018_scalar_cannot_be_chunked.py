"""SP-018: a scalar cannot be chunked by FSDP1 over tensor parallelism.

    torchrun --standalone --nproc-per-node 4 sp_018_scalar_cannot_be_chunked.py

FSDP1's extension for tensor parallelism gets a tensor without dimensions. Needs torch alone. Ends
with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
extension = DTensorExtensions(None)
expected = "a scalar of 3.0"
try:
    chunk = extension.chunk_dtensor(torch.tensor(3.0), mesh["dp"].get_local_rank(), mesh["dp"])
    came = f"a scalar of {chunk.full_tensor().item()}"
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-018 shows" if shows else "SP-018 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
