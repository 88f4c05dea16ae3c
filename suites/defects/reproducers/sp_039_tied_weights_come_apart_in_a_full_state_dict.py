"""SP-039: tied weights come apart in a full state dict.

    torchrun --standalone --nproc-per-node 2 sp_039_tied_weights_come_apart_in_a_full_state_dict.py

The output layer uses the weight of the embedding, which is sharded. A full state dict is taken.
Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

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
model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 4, bias=False))
model[0].weight = nn.Parameter(distribute_tensor(model[0].weight, mesh, [Shard(0)]))
model[1].weight = model[0].weight
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "one tensor under both names"
tied = full["0.weight"].data_ptr() == full["1.weight"].data_ptr()
came = expected if tied else "two tensors"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-039 shows" if shows else "SP-039 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
