"""SP-050: of two paths that meet the later one takes the other's place.

    torchrun --standalone --nproc-per-node 1 sp_050_paths_that_meet_lose_a_leaf.py

A flat state dict whose mapping leads 'a' to a leaf and 'a.b' into that leaf cannot be right. The
function that unflattens is private, _unflatten_state_dict(); set_optimizer_state_dict() calls it
for full states. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch.distributed as dist
from torch.distributed._state_dict_utils import _unflatten_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

flat, mapping = {"a.b": 1, "a": 2}, {"a.b": ("a", "b"), "a": ("a",)}
expected = "an error that names 'a'"
try:
    came = f"{_unflatten_state_dict(flat, mapping)}, where 1 is lost"
except Exception as error:
    came = expected if "'a" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-050 shows" if shows else "SP-050 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
