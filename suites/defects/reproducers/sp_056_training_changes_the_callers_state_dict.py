"""SP-056: on the rank that has the full state dict, results lie in its memory.

    torchrun --standalone --nproc-per-node 2 sp_056_training_changes_the_callers_state_dict.py

Rank 0 broadcasts a full state dict into a model on meta, and the model trains. The state dict of
rank 0, which a second model may be loaded from, must not train with it. Needs torch alone. Ends
with 0 where torch is right, with 1 where not.
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

full = {"weight": torch.zeros(2, 2)} if rank == 0 else {}
with torch.device("meta"):
    model = torch.nn.Linear(2, 2, bias=False)
set_model_state_dict(
    model, dict(full), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
)
with torch.no_grad():
    model.weight += 1
expected = "a state dict that holds zeros still"
came = f"a weight of {full['weight'].tolist()}" if full and full["weight"].any() else expected

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-056 shows" if shows else "SP-056 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
