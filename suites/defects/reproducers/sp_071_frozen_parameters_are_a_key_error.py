"""SP-071: frozen parameters make get_model_state_dict() fail under FSDP1.

    torchrun --standalone --nproc-per-node 2 sp_071_frozen_parameters_are_a_key_error.py

A model of FSDP1 with a frozen bias is asked for its full state dict on rank 0, without what is
frozen; rank 1 is to get an empty one. Only rank 1 has cpu_offload here, with which rank 0 does
nothing else that counts, but torch before 2.14 crashes on the CPU (SP-070). Needs torch alone. Ends
with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

linear = nn.Linear(4, 4)
linear.bias.requires_grad_(False)
model = FullyShardedDataParallel(linear, device_id=torch.device("cpu"), use_orig_params=True)
expected = "a weight on rank 0, nothing elsewhere"
try:
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=rank > 0, ignore_frozen_params=True
    )
    state = get_model_state_dict(model, options=options)
    came = expected if list(state) == ["weight"] * (rank == 0) else f"{list(state)}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-071 shows" if shows else "SP-071 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
