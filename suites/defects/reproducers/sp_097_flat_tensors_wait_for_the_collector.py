"""SP-097: flattening a state dict keeps its tensors in memory until the garbage collector runs.

    torchrun --standalone --nproc-per-node 1 sp_097_flat_tensors_wait_for_the_collector.py

What breaks: a state dict is flattened. Then it is dropped, and so is the result. With the garbage
  collector switched off the tensor stays in memory for good.
Why: a nested function that calls itself is a reference cycle with its closure, which holds the
  flat dict.
For whom: those who switch the collector off, as trainings do to keep their steps even.

A private function is called: torch.distributed.checkpoint has another one of its own.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import gc
import sys
import weakref
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _flatten_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

gc.collect()
gc.disable()
state = {"layer": {"weight": torch.ones(4)}}
weight = weakref.ref(state["layer"]["weight"])
flat = _flatten_state_dict(state)
del state, flat
expected = "the tensor is gone"
got = expected if weight() is None else "the tensor is in memory, and nobody holds it"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-097 shows" if shows else "SP-097 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
