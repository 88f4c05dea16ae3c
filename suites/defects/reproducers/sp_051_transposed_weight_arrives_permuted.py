"""SP-051: a source tensor that is not contiguous arrives in another order.

    torchrun --standalone --nproc-per-node 2 sp_051_transposed_weight_arrives_permuted.py

Rank 0 has a full state dict whose weight is a transposed view, as a checkpoint may hold one, and
broadcasts it into a model. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
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
came = f"a weight of {model.weight.tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-051 shows" if shows else "SP-051 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
