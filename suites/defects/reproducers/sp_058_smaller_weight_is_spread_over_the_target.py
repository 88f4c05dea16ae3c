"""SP-058: targets are not compared with the full tensors that they are to take.

    torchrun --standalone --nproc-per-node 2 sp_058_smaller_weight_is_spread_over_the_target.py

A state dict holds a weight of shape (4, 1), the sharded model one of (4, 3). Rank 0 broadcasts it,
and the one column lands in all three. Needs torch alone. Ends with 0 where torch is right, with 1
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(3, 4, bias=False)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
expected = "an error that names 'weight'"
try:
    set_model_state_dict(
        model,
        {"weight": torch.arange(4.0).reshape(4, 1)} if rank == 0 else {},
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    )
    came = f"no error, and rows of {model.weight.to_local().tolist()}"
except Exception as error:
    came = expected if "weight" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-058 shows" if shows else "SP-058 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
