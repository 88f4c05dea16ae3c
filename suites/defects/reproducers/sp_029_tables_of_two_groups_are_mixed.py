"""SP-029: a ShardedTensor is gathered over all ranks instead of over its own group.

    torchrun --standalone --nproc-per-node 4 sp_029_tables_of_two_groups_are_mixed.py

Ranks 0 and 1 hold a table of ones, ranks 2 and 3 one of twos, each a ShardedTensor on a group of
its own. A full state dict is taken. torch has private names alone for the ShardedTensor. Needs
torch alone. Ends with 0 where torch is right, with 1 where not.
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

groups = [dist.new_group([0, 1], timeout=limit), dist.new_group([2, 3], timeout=limit)]
number = rank // 2
rows = torch.full((1, 4), number + 1.0)
shard = Shard.from_tensor_and_offsets(rows, [rank % 2, 0], rank)
model = nn.Module()
model.table = init_from_local_shards([shard], 2, 4, process_group=groups[number])
model._register_state_dict_hook(state_dict_hook)
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "the rows of the rank's own table"
right = bool(full["table"].eq(number + 1).all())
came = expected if right else f"rows of {full['table'].tolist()}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-029 shows" if shows else "SP-029 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
