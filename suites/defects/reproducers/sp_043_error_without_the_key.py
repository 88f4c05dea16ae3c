"""SP-043: errors of the state dict functions do not say which leaf they are about.

    torchrun --standalone --nproc-per-node 1 sp_043_error_without_the_key.py

A stager that keeps its buffers, as BlockingAsyncStager(cache_staged_state_dict=True) does for
async_save(), is given a state dict with a layer more than its buffers have. That is refused, but
nobody learns which key it was. Needs torch alone. Ends with 0 where torch is right, with 1 where
not.
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
stager.state_dict_cache = BlockingAsyncStager().stage({"weight": torch.zeros(2)})
expected = "an error that names 'new_layer'"
try:
    stager.stage({"weight": torch.zeros(2), "new_layer": torch.zeros(2)})
    came = "no error"
except Exception as error:
    named = "new_layer" in str(error)
    came = expected if named else f"{type(error).__name__} with the text {str(error)!r}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-043 shows" if shows else "SP-043 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
