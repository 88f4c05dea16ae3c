"""SP-028: a full state dict permutes a ShardedTensor whose shards are not in the order of ranks.

    torchrun --standalone --nproc-per-node 2 sp_028_shards_of_other_ranks_are_permuted.py

What breaks: a table of 4 rows is a ShardedTensor. Rank 0 holds the last 2 rows, and rank 1 the
  first 2. get_model_state_dict(full_state_dict=True) puts the last rows first.
Why: the gather puts the shards one after the other in the order of ranks. It does not read their
  offsets from the metadata.
For whom: users who save embedding tables as ShardedTensors, as torchrec does. torch has only
  private names for a ShardedTensor.

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

first = 2 if rank == 0 else 0
rows = torch.arange(4.0).unsqueeze(1)[first : first + 2].clone()
shard = Shard.from_tensor_and_offsets(rows, [first, 0], rank)
model = nn.Module()
model.table = init_from_local_shards([shard], 4, 1)
model._register_state_dict_hook(state_dict_hook)
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "rows [0.0, 1.0, 2.0, 3.0]"
got = f"rows {full['table'].flatten().tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-028 shows" if shows else "SP-028 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
