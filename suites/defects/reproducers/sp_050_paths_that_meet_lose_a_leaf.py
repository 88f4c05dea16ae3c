"""SP-050: unflattening two conflicting paths silently drops a value.

    torchrun --standalone --nproc-per-node 1 sp_050_paths_that_meet_lose_a_leaf.py

What breaks: the mapping puts a value at the path ('a',) and another at ('a', 'b'), which cannot
  both exist. The result holds only one of them.
Why: each value is written to its place without asking whether the place already holds a value or a
  container.
For whom: callers of _unflatten_state_dict(), a private function that set_optimizer_state_dict()
  uses for full states: a wrong mapping loses state without an error.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch.distributed as dist
from torch.distributed._state_dict_utils import _unflatten_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

flat, mapping = {"a.b": 1, "a": 2}, {"a.b": ("a", "b"), "a": ("a",)}
expected = "an error that names 'a'"
try:
    got = f"no error, and {_unflatten_state_dict(flat, mapping)} without the value 1"
except Exception as error:
    got = expected if "'a" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-050 shows" if shows else "SP-050 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
