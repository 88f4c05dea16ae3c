"""SP-078: a missing or extra key of a broadcast load raises on rank 0 alone.

    torchrun --standalone --nproc-per-node 2 sp_078_missing_key_is_told_to_rank_0_alone.py

Rank 0 broadcasts a full state dict that lacks the bias into a model under DDP. Rank 0 raises; the
other waits until the timeout of the collective, here 5 s. Needs torch alone. Ends with 0 where
torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = DistributedDataParallel(nn.Linear(2, 2))
expected = "an error that names 'bias'"
try:
    set_model_state_dict(
        model,
        {"weight": torch.ones(2, 2)} if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    came = "no error"
except Exception as error:
    came = expected if "bias" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-078 shows" if shows else "SP-078 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
