"""SP-070: FSDP1 reads freed memory after a full state dict on the CPU.

    torchrun --standalone --nproc-per-node 2 sp_070_full_state_dict_on_the_cpu_reads_freed_memory.py

A model of FSDP1 on the CPU is asked for its full state dict with cpu_offload. Needs torch alone.
Ends with 0 where torch is right, with 1 where not: values are wrong, or the process ends by
SIGSEGV.
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

model = FullyShardedDataParallel(
    nn.Linear(64, 64), device_id=torch.device("cpu"), use_orig_params=True
)
expected = "a full state dict on rank 0, nothing elsewhere"
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=options)
values = sum(float(value.abs().sum()) for value in state.values())
came = expected if (values > 0) == (rank == 0) else f"values whose sum is {values}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-070 shows" if shows else "SP-070 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
