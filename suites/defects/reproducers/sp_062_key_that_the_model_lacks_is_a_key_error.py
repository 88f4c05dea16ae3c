"""SP-062: a broadcast load with cpu_offload raises KeyError for a key that the model lacks.

    torchrun --standalone --nproc-per-node 2 sp_062_key_that_the_model_lacks_is_a_key_error.py

What breaks: rank 0 broadcasts a state dict with one more key than the model has, with strict=False
  and cpu_offload=True. The load raises KeyError.
Why: with cpu_offload torch reads every received key from the model's own state dict, without asking
  whether it is there.
For whom: users who load a larger checkpoint into a smaller model with strict=False.

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

full = {"old.weight": torch.zeros(2), "weight": torch.ones(3, 3)}
model = torch.nn.Linear(3, 3, bias=False)
expected = "the weight loaded, and the other key ignored"
try:
    set_model_state_dict(
        model,
        full if rank == 0 else {},
        options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True, cpu_offload=True, strict=False
        ),
    )
    got = expected if bool(model.weight.eq(1).all()) else f"a weight of {model.weight.tolist()}"
except Exception as error:
    got = f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-062 shows" if shows else "SP-062 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
