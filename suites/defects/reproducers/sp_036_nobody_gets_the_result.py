"""SP-036: a model on ranks 2 and 3 gets no full state dict with cpu_offload.

    torchrun --standalone --nproc-per-node 4 sp_036_nobody_gets_the_result.py

What breaks: the mesh of the model is [2, 3]. These two ranks ask for a full state dict with
  cpu_offload=True, and both get an empty dict.
Why: with cpu_offload only global rank 0 keeps the result, and rank 0 does not hold the model.
For whom: users who place a model on a part of the ranks, as for pipeline stages or a reward model:
  the checkpoint is empty, and no error is raised.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = DeviceMesh("cpu", [2, 3])
expected = got = "the weight on rank 2 or rank 3"
if rank >= 2:
    model = nn.Linear(1, 4, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(4, 1), mesh, [Shard(0)]))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    try:
        held = [False, False]
        mine = "weight" in get_model_state_dict(model, options=options)
        dist.all_gather_object(held, mine, group=mesh.get_group())
        got = expected if any(held) else "an empty state dict on both"
    except Exception as error:
        got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in (2, 3)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-036 shows" if shows else "SP-036 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
