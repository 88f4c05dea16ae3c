"""SP-015: torch.compile breaks its graph at each tensor-parallel parameter under DDP.

    torchrun --standalone --nproc-per-node 4 sp_015_compiled_module_has_many_graphs.py

A model under tensor parallelism is wrapped in DDP, and compiled as a whole. The backend counts
graphs. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

graphs = []


def count(graph, inputs):
    graphs.append(graph)
    return graph.forward


mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
ddp = DistributedDataParallel(model, device_mesh=mesh["dp"])
model.compile(backend=count)
expected = "1 graph"
try:
    ddp(torch.ones(2, 8)).sum().backward()
    came = f"{len(graphs)} graph" + "s" * (len(graphs) != 1)
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-015 shows" if shows else "SP-015 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
