"""SP-063: a full state dict is broadcast tensor by tensor, each of them whole, to every rank.

    torchrun --standalone --nproc-per-node 2 sp_063_each_tensor_is_a_broadcast_of_its_own.py

Rank 0 broadcasts a full state dict of twenty small layers into a model, while collectives are
counted. They fit into a few broadcasts. Needs torch alone. Ends with 0 where torch is right, with 1
where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor.debug import CommDebugMode

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(20)])
full = {f"{layer}.weight": torch.ones(2, 2) for layer in range(20)}
with CommDebugMode() as counted:
    set_model_state_dict(
        model,
        full if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
expected = "fewer collectives than tensors"
number = counted.get_total_counts()
came = expected if number < 20 else f"{number} collectives for 20 tensors"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-063 shows" if shows else "SP-063 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
