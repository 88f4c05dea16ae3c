"""SP-057: a value that the source cannot send leaves the other ranks waiting.

    torchrun --standalone --nproc-per-node 2 sp_057_dtensor_in_the_source_hangs_the_others.py

Rank 0's full state dict holds a DTensor where a plain tensor belongs, as after a forgotten
full_tensor(). Rank 0 raises, the other waits until the timeout of the collective, here 5 s. Needs
torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

weight = distribute_tensor(torch.ones(3, 3), init_device_mesh("cpu", (size,)), [Replicate()])
model = torch.nn.Linear(3, 3, bias=False)
expected = "an error that names 'weight'"
try:
    set_model_state_dict(
        model,
        {"weight": weight} if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    came = "no error"
except Exception as error:
    named = "weight" in str(error)
    came = expected if named else f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-057 shows" if shows else "SP-057 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
