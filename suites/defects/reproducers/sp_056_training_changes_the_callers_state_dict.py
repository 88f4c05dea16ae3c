"""SP-056: after a load, the parameters of rank 0 share memory with the caller's state dict.

    torchrun --standalone --nproc-per-node 2 sp_056_training_changes_the_callers_state_dict.py

What breaks: rank 0 broadcasts a full state dict of zeros into a model on meta, and the model
  trains. The caller's state dict on rank 0 changes, too.
Why: rank 0 already has the tensor, so detach() and to(device) return views of it, and the view
  becomes the parameter.
For whom: users who load the same state dict into a second model, such as a reference model or a
  moving average: it gets trained values on rank 0 only.

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

full = {"weight": torch.zeros(2, 2)} if rank == 0 else {}
with torch.device("meta"):
    model = torch.nn.Linear(2, 2, bias=False)
set_model_state_dict(
    model, dict(full), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
)
with torch.no_grad():
    model.weight += 1
expected = "zeros in the caller's state dict"
changed = bool(full) and bool(full["weight"].any())
got = f"{full['weight'].tolist()} in the caller's state dict" if changed else expected

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-056 shows" if shows else "SP-056 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
