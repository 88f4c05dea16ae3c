"""SP-045: pin_memory with share_memory raises an AssertionError on a CPU build of torch.

    torchrun --standalone --nproc-per-node 1 sp_045_pinned_and_shared_memory_without_cuda.py

What breaks: pinned memory needs an accelerator. pin_memory=True alone says so in a RuntimeError;
  with share_memory=True the call raises an AssertionError of torch.cuda.
Why: the function calls the CUDA runtime directly, and does not check that this build of torch has
  it.
For whom: callers of _create_cpu_state_dict(), the private function that takes both options, without
  a GPU. On a machine with a GPU nothing shows.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _create_cpu_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

expected = "a RuntimeError or ValueError, or memory that is pinned and shared"
try:
    buffers = _create_cpu_state_dict({"weight": torch.zeros(2)}, pin_memory=True, share_memory=True)
    good = buffers["weight"].is_pinned() and buffers["weight"].is_shared()
    got = expected if good else "memory of another kind"
except (RuntimeError, ValueError):
    got = expected
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-045 shows" if shows else "SP-045 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
