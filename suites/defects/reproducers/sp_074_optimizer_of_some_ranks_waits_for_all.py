"""SP-074: the optimizer state of FSDP1 on some ranks is gathered over all.

    torchrun --standalone --nproc-per-node 4 sp_074_optimizer_of_some_ranks_waits_for_all.py

A model of FSDP1 lies on ranks 2 and 3 of four, which ask for the optimizer's state. They wait for
ranks 0 and 1 until the timeout of the collective, here 5 s. Affects torch before 2.13. Needs torch
alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

group = dist.new_group([2, 3])
expected = came = "moments of shape (4, 4) on ranks 2 and 3"
if rank in (2, 3):
    model = FullyShardedDataParallel(
        nn.Linear(4, 4, bias=False), group, device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.Adam(model.parameters())
    options = StateDictOptions(full_state_dict=True)
    try:
        state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
        shape = tuple(state["weight"]["exp_avg"].shape)
        came = f"moments of shape {shape} on ranks 2 and 3"
    except Exception as error:
        came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-074 shows" if shows else "SP-074 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
