"""SP-082: errors of the data-parallel functions name nothing.

    torchrun --standalone --nproc-per-node 1 sp_082_error_without_a_word.py

A parameter is put in place of one that the module does not have. The function is private,
_update_module_param(), by which DDP and replicate() exchange tensor-parallel parameters; it is to
say which name is unknown. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.parallel.ddp import _update_module_param

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

module = nn.Linear(2, 2)
expected = "an error that names 'wieght'"
try:
    _update_module_param([(module, "wieght", nn.Parameter(torch.ones(2, 2)))])
    came = "no error"
except Exception as error:
    named = "wieght" in str(error)
    came = expected if named else f"{type(error).__name__} with the text {str(error)!r}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-082 shows" if shows else "SP-082 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
