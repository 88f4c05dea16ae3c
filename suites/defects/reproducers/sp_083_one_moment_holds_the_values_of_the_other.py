"""SP-083: a full optimizer state of FSDP1 on the CPU has one moment twice.

    torchrun --standalone --nproc-per-node 2 sp_083_one_moment_holds_the_values_of_the_other.py

A model of FSDP1 on the CPU takes a step of Adam with gradients of 4. Its full optimizer state is
asked for with cpu_offload. The first moment comes out with the values of the second. Needs torch
alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = FullyShardedDataParallel(
    nn.Linear(4, 4, bias=False), device_id=torch.device("cpu"), use_orig_params=True
)
optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.75))
model(torch.full((1, 4), 4.0)).sum().backward()
optimizer.step()
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_optimizer_state_dict(model, optimizer, options=options)
expected = came = "exp_avg of 2.0 and exp_avg_sq of 4.0 on rank 0"
if rank == 0:
    means = [state["state"]["weight"][name].mean().item() for name in ("exp_avg", "exp_avg_sq")]
    came = f"exp_avg of {means[0]} and exp_avg_sq of {means[1]} on rank 0"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-083 shows" if shows else "SP-083 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
