"""SP-054: targets on meta come to life in the dtype of the checkpoint.

    torchrun --standalone --nproc-per-node 2 sp_054_bfloat16_model_becomes_float32.py

A model on meta is of bfloat16, the full state dict that rank 0 broadcasts into it of float32. Needs
torch alone. Ends with 0 where torch is right, with 1 where not.
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

with torch.device("meta"):
    model = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
set_model_state_dict(
    model,
    {"weight": torch.ones(2, 2)} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
expected = "a weight of torch.bfloat16"
came = f"a weight of {model.weight.dtype}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-054 shows" if shows else "SP-054 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
