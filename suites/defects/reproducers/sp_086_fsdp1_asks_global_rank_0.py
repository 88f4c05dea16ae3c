"""SP-086: FSDP1 on some ranks asks global rank 0 about its optimizer state.

    torchrun --standalone --nproc-per-node 4 sp_086_fsdp1_asks_global_rank_0.py

What breaks: an FSDP1 model is on ranks 2 and 3 of four. FSDP.optim_state_dict() with the group of
  these ranks raises "Global rank 0 is not part of group".
Why: FSDP1 broadcasts from global rank 0, although the first rank of the group has the answer. With
  use_orig_params=True the same happens in a load from the first rank.
For whom: users who place an FSDP1 model on a part of the ranks: a second model, a pipeline stage.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
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
        nn.Linear(4, 4, bias=False), group, device_id=torch.device("cpu")
    )
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    try:
        state = FullyShardedDataParallel.optim_state_dict(model, optimizer, group=group)["state"]
        got = f"moments of shape {tuple(state['weight']['exp_avg'].shape)}"
    except Exception as error:
        got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in (2, 3)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-086 shows" if shows else "SP-086 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
