"""SP-048: asking whether two state dicts are similar copies the first into the second.

    torchrun --standalone --nproc-per-node 1 sp_048_asking_whether_alike_overwrites.py

The question is a private function, _check_state_dict_similarity(), which no public call asks. It
must answer, and leave both as they are. Needs torch alone. Ends with 0 where torch is right, with 1
where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed._state_dict_utils import _check_state_dict_similarity

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

first, second = {"weight": torch.ones(2)}, {"weight": torch.zeros(2)}
alike = _check_state_dict_similarity(first, second)
expected = "True, and a second weight of [0.0, 0.0]"
came = f"{alike}, and a second weight of {second['weight'].tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-048 shows" if shows else "SP-048 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
