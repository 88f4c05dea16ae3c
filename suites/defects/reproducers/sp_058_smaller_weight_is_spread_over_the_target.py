"""SP-058: a full tensor of the wrong shape is repeated to fill a sharded parameter.

    torchrun --standalone --nproc-per-node 2 sp_058_smaller_weight_is_spread_over_the_target.py

What breaks: the state dict holds a weight of shape (4, 1), and the model one of shape (4, 3). After
  a broadcast load the one column fills all three, and no error is raised.
Why: the load calls copy_() without comparing shapes, and copy_() broadcasts.
For whom: users who load a checkpoint of another model configuration into a sharded model.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
    got = f"no error, and rows {model.weight.to_local().tolist()}"
except Exception as error:
    got = expected if "weight" in str(error) else f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-058 shows" if shows else "SP-058 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
