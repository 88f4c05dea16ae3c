"""SP-022: FSDP1 gathers chunks of different dtypes as if they were of one.

    torchrun --standalone --nproc-per-node 4 sp_022_chunk_of_another_dtype_is_gathered.py

What breaks: a sharded state dict of ones is loaded into FSDP1 over tensor parallelism. Ranks 0 and
  1 hold float16, ranks 2 and 3 bfloat16. Two ranks load values other than one.
Why: the gather trusts each rank's own dtype. Both dtypes have 2 bytes, so each rank reads the
  other's bytes as its own dtype.
For whom: users who load sharded state dicts that ranks prepare on their own, where one rank casts
  differently.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
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
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
    good = bool(weight.eq(1).all())
    got = expected if good else f"no error, and a weight of {weight[0, 0]:.4f}"
except Exception as error:
    got = expected if "dtype" in str(error) else f"{type(error).__name__}: {error}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-022 shows" if shows else "SP-022 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
