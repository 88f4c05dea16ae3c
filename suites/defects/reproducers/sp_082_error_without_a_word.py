"""SP-082: errors of the data-parallel functions do not name the wrong input.

    torchrun --standalone --nproc-per-node 1 sp_082_error_without_a_word.py

What breaks: _update_module_param() gets the name of a parameter that the module does not have. It
  raises an AssertionError with an empty message.
Why: the function raises AssertionError without a text.
For whom: developers of DDP and replicate(), which replace tensor-parallel parameters by this
  private function.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel.ddp import _update_module_param

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

module = nn.Linear(2, 2)
expected = "an error that names 'wieght'"
try:
    _update_module_param([(module, "wieght", nn.Parameter(torch.ones(2, 2)))])
    got = "no error"
except Exception as error:
    named = "wieght" in str(error)
    got = expected if named else f"{type(error).__name__} with the text {str(error)!r}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-082 shows" if shows else "SP-082 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
