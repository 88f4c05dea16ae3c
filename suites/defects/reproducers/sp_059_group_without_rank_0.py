"""SP-059: the source of a broadcast is global rank 0, also in a group that lacks it.

    torchrun --standalone --nproc-per-node 4 sp_059_group_without_rank_0.py

Ranks 2 and 3 have a group, and the first of them a full state dict for both. Only a private
function takes a group, _broadcast_state_dict(); set_model_state_dict() always broadcasts over all
ranks. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _broadcast_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

group = dist.new_group([2, 3])
expected = came = "a weight of [1.0, 1.0] on ranks 2 and 3"
if rank in (2, 3):
    full = {"weight": torch.ones(2)} if rank == 2 else {}
    mine = {"weight": torch.zeros(2)}
    try:
        _broadcast_state_dict(full, mine, torch.device("cpu"), pg=group)
        came = f"a weight of {mine['weight'].tolist()} on ranks 2 and 3"
    except Exception as error:
        came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-059 shows" if shows else "SP-059 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
