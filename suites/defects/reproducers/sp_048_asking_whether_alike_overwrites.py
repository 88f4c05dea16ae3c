"""SP-048: _check_state_dict_similarity() overwrites the second state dict.

    torchrun --standalone --nproc-per-node 1 sp_048_asking_whether_alike_overwrites.py

What breaks: the function should tell whether two state dicts have the same keys, shapes and dtypes.
  It also copies the first into the second.
Why: it passes the second state dict as a companion, and the function that walks state dicts copies
  into companions.
For whom: callers of this private function, which no public function calls.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _check_state_dict_similarity

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

first, second = {"weight": torch.ones(2)}, {"weight": torch.zeros(2)}
alike = _check_state_dict_similarity(first, second)
expected = "similar: True, and [0.0, 0.0] in the second state dict"
got = f"similar: {alike}, and {second['weight'].tolist()} in the second state dict"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-048 shows" if shows else "SP-048 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
