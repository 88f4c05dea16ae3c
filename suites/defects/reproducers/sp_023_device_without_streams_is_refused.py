"""SP-023: FSDP1's extension for tensor parallelism refuses a device without streams.

    torchrun --standalone --nproc-per-node 2 sp_023_device_without_streams_is_refused.py

What breaks: an empty object stands for the device module of a backend without streams. The
  extension should turn a local tensor into a DTensor, and raises an AttributeError.
Why: the extension calls current_stream() of the device module, whether or not the module has it.
For whom: vendors of devices whose PyTorch backend has no streams.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
import types
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
extension = DTensorExtensions(types.SimpleNamespace())
local, spec = extension.pre_flatten_transform(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
expected = "a DTensor"
try:
    got = f"a {type(extension.post_unflatten_transform(local, spec)).__name__}"
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-023 shows" if shows else "SP-023 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
