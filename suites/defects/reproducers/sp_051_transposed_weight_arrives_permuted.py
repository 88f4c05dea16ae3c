"""SP-051: a transposed weight arrives permuted on the other ranks.

    torchrun --standalone --nproc-per-node 2 sp_051_transposed_weight_arrives_permuted.py

What breaks: rank 0's full state dict holds a transposed view, as a checkpoint may. Rank 0
  broadcasts it into a model, and rank 1 gets permuted values.
Why: rank 0 sends the view's memory as it is. The other ranks receive the bytes into a contiguous
  tensor.
For whom: users who load with broadcast_from_rank0=True from transposed, sliced or channels_last
  tensors, such as converted weights.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

weight = torch.arange(9.0).reshape(3, 3).t()  # a view: the memory is not that of its rows
model = torch.nn.Linear(3, 3, bias=False)
set_model_state_dict(
    model,
    {"weight": weight} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = f"a weight of {weight.tolist()}"
got = f"a weight of {model.weight.tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-051 shows" if shows else "SP-051 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
