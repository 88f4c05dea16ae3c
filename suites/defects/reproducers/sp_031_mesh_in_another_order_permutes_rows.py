"""SP-031: a tensor on a mesh that lists its ranks in another order comes out permuted.

    torchrun --standalone --nproc-per-node 2 sp_031_mesh_in_another_order_permutes_rows.py

The mesh is [1, 0], so that rank 1 holds the first rows of the weight and rank 0 the last ones. A
full state dict is taken. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = DeviceMesh("cpu", [1, 0])
rows = torch.arange(4.0).unsqueeze(1).chunk(2)[mesh.get_coordinate()[0]]
model = nn.Linear(1, 4, bias=False)
model.weight = nn.Parameter(DTensor.from_local(rows, mesh, [Shard(0)]))
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "rows of [0.0, 1.0, 2.0, 3.0]"
came = f"rows of {full['weight'].flatten().tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-031 shows" if shows else "SP-031 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
