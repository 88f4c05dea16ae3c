"""SP-032: ranks whose state dicts have another order of keys swap tensors.

    torchrun --standalone --nproc-per-node 2 sp_032_another_order_of_keys_swaps_tensors.py

Rank 1 adds its two weights in the other order. A full state dict is taken. Needs torch alone. Ends
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
weights = {
    "ones": nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])),
    "twos": nn.Parameter(distribute_tensor(torch.full((4,), 2.0), mesh, [Shard(0)])),
}
model = nn.Module()
for name in sorted(weights, reverse=rank == 1):
    model.register_parameter(name, weights[name])
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "ones: [1.0, 1.0, 1.0, 1.0], twos: [2.0, 2.0, 2.0, 2.0]"
came = ", ".join(f"{name}: {full[name].tolist()}" for name in sorted(full))

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-032 shows" if shows else "SP-032 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
