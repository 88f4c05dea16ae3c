"""SP-023: a device without streams is refused by FSDP1's extension for tensor parallelism.

    torchrun --standalone --nproc-per-node 2 sp_023_device_without_streams_is_refused.py

A device of another vendor has a module without streams, here an empty one. The extension makes a
local tensor a DTensor again. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
import types
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
extension = DTensorExtensions(types.SimpleNamespace())
local, spec = extension.pre_flatten_transform(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
expected = "DTensor"
try:
    came = type(extension.post_unflatten_transform(local, spec)).__name__
except Exception as error:
    came = f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-023 shows" if shows else "SP-023 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
