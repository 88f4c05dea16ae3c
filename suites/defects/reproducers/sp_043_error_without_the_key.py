"""SP-043: errors of the state dict functions do not name the key.

    torchrun --standalone --nproc-per-node 1 sp_043_error_without_the_key.py

What breaks: a stager that keeps its buffers for async_save() gets a state dict with one more layer
  than its buffers have. It raises CompanionMismatch with an empty message.
Why: the function that walks the state dict does not keep the path to the current value.
For whom: users of async_save() and get_model_state_dict() who must find one wrong key among
  thousands.

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
stager.state_dict_cache = BlockingAsyncStager().stage({"weight": torch.zeros(2)})
expected = "an error that names 'new_layer'"
try:
    stager.stage({"weight": torch.zeros(2), "new_layer": torch.zeros(2)})
    got = "no error"
except Exception as error:
    named = "new_layer" in str(error)
    got = expected if named else f"{type(error).__name__} with the text {str(error)!r}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-043 shows" if shows else "SP-043 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
