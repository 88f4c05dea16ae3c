"""SP-030: gathering keeps the graph of the live parameters alive.

    torchrun --standalone --nproc-per-node 4 sp_030_graph_is_kept.py

FSDP1's extension for tensor parallelism gathers a weight that trains. Needs torch alone. Ends with
0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # before tensor.parallel.fsdp: SP-024
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel.fsdp import DTensorExtensions

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
weight = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Replicate()]).requires_grad_()
local = DTensorExtensions(None).all_gather_dtensor(weight, mesh)
expected = "no graph"
came = f"a graph from {local.grad_fn.name()}" if local.requires_grad else expected

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-030 shows" if shows else "SP-030 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
