"""SP-074: the optimizer state of an FSDP1 model on some ranks is gathered over all ranks.

    torchrun --standalone --nproc-per-node 4 sp_074_optimizer_of_some_ranks_waits_for_all.py

What breaks: an FSDP1 model is on ranks 2 and 3 of four. These ranks ask for the optimizer state,
  and wait for ranks 0 and 1 until the timeout of the collective, here 5 s.
Why: torch before 2.13 calls FSDP.optim_state_dict() without the model's process group, so FSDP1
  uses the default group.
For whom: users of torch before 2.13 who place an FSDP1 model on a part of the ranks.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

group = dist.new_group([2, 3])
expected = got = "moments of shape (4, 4)"
if rank in (2, 3):
    model = FullyShardedDataParallel(
        nn.Linear(4, 4, bias=False), group, device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = torch.optim.Adam(model.parameters())
    options = StateDictOptions(full_state_dict=True)
    try:
        state = get_optimizer_state_dict(model, optimizer, options=options)["state"]
        shape = tuple(state["weight"]["exp_avg"].shape)
        got = f"moments of shape {shape}"
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in (2, 3)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-074 shows" if shows else "SP-074 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
