"""SP-054: loading a full state dict into a model on meta ignores the model's dtype.

    torchrun --standalone --nproc-per-node 2 sp_054_bfloat16_model_becomes_float32.py

What breaks: a bfloat16 model on meta loads a float32 state dict that rank 0 broadcasts. The model
  is float32 afterwards.
Why: a tensor on meta has no memory to copy into, so the received tensor replaces it, with the dtype
  of the checkpoint.
For whom: users who create large models on meta and load a checkpoint of a larger dtype: the model
  takes more memory than planned.

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

with torch.device("meta"):
    model = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
set_model_state_dict(
    model,
    {"weight": torch.ones(2, 2)} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = "a weight of torch.bfloat16"
got = f"a weight of {model.weight.dtype}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-054 shows" if shows else "SP-054 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
