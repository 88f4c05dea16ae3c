"""SP-091: a checkpoint of pipeline stages keeps the param_groups of one rank.

    torchrun --standalone --nproc-per-node 2 sp_091_checkpoint_keeps_one_ranks_param_groups.py

What breaks: each rank has a stage of a pipeline, and an optimizer with a learning rate of its own.
  Their states are saved and loaded through torch.distributed.checkpoint without an error. One of
  the ranks gets the other's param_groups. Its optimizer has no learning rate, and no betas, then.
Why: param_groups is one object of the checkpoint on each rank. Of those with the same key one is
  written, whatever the others hold.
For whom: users of pipeline parallelism, and others whose ranks have parameters of their own, who
  save optimizers without flatten_optimizer_state_dict.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

stage = nn.ModuleDict({f"stage{rank}": nn.Linear(4, 4, bias=False)})
optimizers = [torch.optim.Adam(stage.parameters(), lr=lr) for lr in (1.0 + rank, 0.5)]
saved, state = [{"optimizer": get_optimizer_state_dict(stage, o)} for o in optimizers]
with tempfile.TemporaryDirectory() as own:
    folder = [own]
    dist.broadcast_object_list(folder)
    dcp.save(saved, checkpoint_id=folder[0])
    dcp.load(state, checkpoint_id=folder[0])
    dist.barrier()  # rank 0 removes the folder
loaded = optimizers[1]
set_optimizer_state_dict(stage, loaded, state["optimizer"])
expected = "this rank's learning rate"
lr = loaded.param_groups[0].get("lr")
got = expected if lr == 1.0 + rank else f"{lr} instead of {1.0 + rank}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-091 shows" if shows else "SP-091 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
