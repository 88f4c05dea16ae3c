"""SP-008: a tensor that a collective still writes comes out of a state dict unfinished.

    torchrun --standalone --nproc-per-node 2 sp_008_pending_tensor_is_saved.py

A buffer is the result of an asynchronous redistribution of a DTensor. It is saved on the CPU. Needs
torch alone. Ends with 0 where torch is right, with 1 where not.
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
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

table = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (size,)), [Shard(0)])
model = nn.Linear(2, 2)
model.register_buffer(
    "table", table.redistribute(placements=[Replicate()], async_op=True).to_local()
)
saved = get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))
expected = "a finished Tensor"
finished = type(saved["table"]) is torch.Tensor
came = expected if finished else f"a pending {type(saved['table']).__name__}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-008 shows" if shows else "SP-008 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
