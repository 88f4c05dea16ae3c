"""SP-028: a ShardedTensor is gathered as if its shards were equal chunks of rows.

    torchrun --standalone --nproc-per-node 2 sp_028_shards_of_other_ranks_are_permuted.py

A table of 4 rows is a ShardedTensor. Rank 0 holds the last 2 rows, rank 1 the first ones. A full
state dict is taken. torch has private names alone for the ShardedTensor. Needs torch alone. Ends
with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards, state_dict_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

first = 2 if rank == 0 else 0
rows = torch.arange(4.0).unsqueeze(1)[first : first + 2].clone()
shard = Shard.from_tensor_and_offsets(rows, [first, 0], rank)
model = nn.Module()
model.table = init_from_local_shards([shard], 4, 1)
model._register_state_dict_hook(state_dict_hook)
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "rows of [0.0, 1.0, 2.0, 3.0]"
came = f"rows of {full['table'].flatten().tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-028 shows" if shows else "SP-028 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
