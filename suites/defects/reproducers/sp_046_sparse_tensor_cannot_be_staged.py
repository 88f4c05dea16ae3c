"""SP-046: sparse tensors cannot be staged.

    torchrun --standalone --nproc-per-node 1 sp_046_sparse_tensor_cannot_be_staged.py

What breaks: BlockingAsyncStager gets a sparse tensor, which torch.save() can save. It raises.
Why: the stager asks every tensor for its data pointer. A sparse tensor has none.
For whom: users of async_save() whose state dict holds sparse tensors, such as masks.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

sparse = torch.eye(3).to_sparse()
expected = "a sparse tensor of the same values"
try:
    staged = BlockingAsyncStager().stage({"weight": sparse})["weight"]
    good = staged.is_sparse and torch.equal(staged.to_dense(), sparse.to_dense())
    got = expected if good else f"{staged}"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-046 shows" if shows else "SP-046 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
