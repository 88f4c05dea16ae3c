"""SP-042: a state dict is copied into one that it does not fit.

    torchrun --standalone --nproc-per-node 1 sp_042_smaller_table_is_staged_as_the_old_one.py

A stager that keeps its buffers, as BlockingAsyncStager(cache_staged_state_dict=True) does for
async_save(), stages a weight of four elements, and later one of a single element, which copy_()
spreads over the old buffer. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

stager = BlockingAsyncStager(cache_staged_state_dict=True)
# What the first stage() would leave here, but not in pinned memory, which needs an accelerator.
stager.state_dict_cache = BlockingAsyncStager().stage({"weight": torch.zeros(4)})
expected = "[7.0], or an error that names 'weight'"
try:
    staged = stager.stage({"weight": torch.full((1,), 7.0)})["weight"].tolist()
    came = expected if staged == [7.0] else f"{staged}"
except Exception as error:
    came = expected if "weight" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-042 shows" if shows else "SP-042 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
