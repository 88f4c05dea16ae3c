"""SP-078: a missing key in a broadcast load raises on rank 0, and the other ranks hang.

    torchrun --standalone --nproc-per-node 2 sp_078_missing_key_is_told_to_rank_0_alone.py

What breaks: rank 0 broadcasts a full state dict without the bias into a model under DDP. Rank 0
  raises; rank 1 waits until the timeout of the collective, here 5 s.
Why: only rank 0 has the state dict, so only rank 0 finds the missing key, and raises before it
  enters the broadcast.
For whom: users who load with broadcast_from_rank0=True: the job hangs, and only rank 0's log has
  the error.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
    got = "no error"
except Exception as error:
    got = expected if "bias" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-078 shows" if shows else "SP-078 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
