"""SP-029: a ShardedTensor is gathered over all ranks instead of over its own group.

    torchrun --standalone --nproc-per-node 4 sp_029_tables_of_two_groups_are_mixed.py

What breaks: ranks 0 and 1 hold a table of ones, ranks 2 and 3 a table of twos, each a ShardedTensor
  on its own group. A full state dict on ranks 2 and 3 holds the table of ranks 0 and 1.
Why: the gather uses the default process group. The ShardedTensor's own group is not passed on.
For whom: users who shard tables over a part of the ranks. torch has only private names for a
  ShardedTensor.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards, state_dict_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
expected = "the table of this rank's own group"
right = bool(full["table"].eq(number + 1).all())
got = expected if right else f"a table of {full['table'].tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-029 shows" if shows else "SP-029 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
