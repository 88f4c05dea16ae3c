"""SP-064: a broadcast load into a sharded model fails under torch.device("meta").

    torchrun --standalone --nproc-per-node 2 sp_064_default_device_of_meta_breaks_the_load.py

What breaks: rank 0 broadcasts a full state dict into a sharded model inside the context
  torch.device("meta"), in which large models are created. The load raises.
Why: to find this rank's rows torch creates helper tensors on the default device, and reads their
  values. A tensor on meta has none.
For whom: users who create and load a large model inside one torch.device("meta") block.

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

model = nn.Linear(2, 2, bias=False)
fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
full = {"weight": torch.ones(2, 2)} if rank == 0 else {}
expected = "a row of [1.0, 1.0] on this rank"
try:
    with torch.device("meta"):
        set_model_state_dict(
            model,
            full,
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
    got = f"a row of {model.weight.to_local()[0].tolist()} on this rank"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-064 shows" if shows else "SP-064 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
