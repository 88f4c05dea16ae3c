"""SP-022: chunks that ranks hold otherwise are gathered together.

    torchrun --standalone --nproc-per-node 4 sp_022_chunk_of_another_dtype_is_gathered.py

A sharded state dict of ones is loaded into FSDP1 over tensor parallelism. Ranks 0 and 1 hold their
shards as float16, ranks 2 and 3 as bfloat16. Needs torch alone. Ends with 0 where torch is right,
with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(8, 16, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
state = get_model_state_dict(model)
ones = torch.ones(4, 8, dtype=torch.float16 if rank < 2 else torch.bfloat16)
state["0.weight"] = DTensor.from_local(ones, mesh, state["0.weight"].placements)
expected = "an error that names the dtype, or a weight of ones"
try:
    set_model_state_dict(model, state)
    weight = get_model_state_dict(model)["0.weight"].to_local()
    came = expected if bool(weight.eq(1).all()) else f"a weight with rows of {weight[0, 0]:.4f}"
except Exception as error:
    came = expected if "dtype" in str(error) else f"{type(error).__name__}: {error}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-022 shows" if shows else "SP-022 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
