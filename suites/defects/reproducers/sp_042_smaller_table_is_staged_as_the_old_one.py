"""SP-042: staging a smaller tensor into a cached buffer repeats its value.

    torchrun --standalone --nproc-per-node 1 sp_042_smaller_table_is_staged_as_the_old_one.py

What breaks: a stager keeps its buffers for async_save(), and first stages a weight of 4 elements.
  Then it stages a weight of 1 element, and returns 4 copies of it.
Why: the stager calls copy_() without comparing shapes, and copy_() broadcasts.
For whom: users of BlockingAsyncStager(cache_staged_state_dict=True) whose state dict changes its
  shapes between saves, such as a growing vocabulary.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

stager = BlockingAsyncStager(cache_staged_state_dict=True)
# What the first stage() would leave here, but not in pinned memory, which needs an accelerator.
stager.state_dict_cache = BlockingAsyncStager().stage({"weight": torch.zeros(4)})
expected = "a staged weight of [7.0], or an error that names 'weight'"
try:
    staged = stager.stage({"weight": torch.full((1,), 7.0)})["weight"].tolist()
    got = expected if staged == [7.0] else f"a staged weight of {staged}"
except Exception as error:
    got = expected if "weight" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-042 shows" if shows else "SP-042 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
