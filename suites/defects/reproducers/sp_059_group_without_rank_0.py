"""SP-059: a broadcast in a group without global rank 0 raises.

    torchrun --standalone --nproc-per-node 4 sp_059_group_without_rank_0.py

What breaks: ranks 2 and 3 form a group, and rank 2 has a full state dict for both.
  _broadcast_state_dict(pg=group) raises.
Why: the function always takes global rank 0 as the source, whatever group it gets.
For whom: callers of this private function, the only one that takes a group. set_model_state_dict()
  always broadcasts over all ranks.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _broadcast_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

group = dist.new_group([2, 3])
expected = got = "a weight of [1.0, 1.0]"
if rank in (2, 3):
    full = {"weight": torch.ones(2)} if rank == 2 else {}
    mine = {"weight": torch.zeros(2)}
    try:
        _broadcast_state_dict(full, mine, torch.device("cpu"), pg=group)
        got = f"a weight of {mine['weight'].tolist()}"
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in (2, 3)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-059 shows" if shows else "SP-059 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
