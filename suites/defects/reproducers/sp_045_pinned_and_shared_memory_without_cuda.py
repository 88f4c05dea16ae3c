"""SP-045: pin_memory with share_memory fails on a torch that was built for the CPU.

    torchrun --standalone --nproc-per-node 1 sp_045_pinned_and_shared_memory_without_cuda.py

Buffers in memory that is pinned and shared cannot be had without an accelerator; a RuntimeError or
ValueError is to say so, as it does for pin_memory alone. Only a private function takes both,
_create_cpu_state_dict(). On a machine with a GPU there is nothing to see. Needs torch alone. Ends
with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _create_cpu_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

expected = "a RuntimeError or ValueError, or memory that is pinned and shared"
try:
    buffers = _create_cpu_state_dict({"weight": torch.zeros(2)}, pin_memory=True, share_memory=True)
    good = buffers["weight"].is_pinned() and buffers["weight"].is_shared()
    came = expected if good else "memory of another kind"
except (RuntimeError, ValueError):
    came = expected
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-045 shows" if shows else "SP-045 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
