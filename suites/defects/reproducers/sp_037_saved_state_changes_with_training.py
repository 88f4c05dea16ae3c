"""SP-037: a saved state dict is the live tensors, and changes when training goes on.

    torchrun --standalone --nproc-per-node 1 sp_037_saved_state_changes_with_training.py

A full state dict is taken onto the CPU, where the model is already. The optimizer makes a step.
Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(2, 2, bias=False)
nn.init.ones_(model.weight)
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
saved = get_model_state_dict(model, options=options)
expected = f"a saved weight of {saved['weight'].tolist()}"
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
came = f"a saved weight of {saved['weight'].tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-037 shows" if shows else "SP-037 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
