"""SP-008: a state dict holds a tensor that a collective has not finished writing.

    torchrun --standalone --nproc-per-node 2 sp_008_pending_tensor_is_saved.py

What breaks: a buffer is the result of an asynchronous redistribute() of a DTensor.
  get_model_state_dict(cpu_offload=True) returns it as an AsyncCollectiveTensor.
Why: torch waits only for the result of its own gather. Nobody waits for a plain tensor of the state
  dict that is still pending.
For whom: users who keep results of asynchronous collectives in a state dict: a thread that writes
  the file may read bytes that have not arrived.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

table = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (size,)), [Shard(0)])
model = nn.Linear(2, 2)
model.register_buffer(
    "table", table.redistribute(placements=[Replicate()], async_op=True).to_local()
)
saved = get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))
expected = "a finished torch.Tensor"
finished = type(saved["table"]) is torch.Tensor
got = expected if finished else f"a pending {type(saved['table']).__name__}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-008 shows" if shows else "SP-008 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
