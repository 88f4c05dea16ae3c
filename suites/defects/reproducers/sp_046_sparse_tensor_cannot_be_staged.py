"""SP-046: sparse tensors cannot be staged.

    torchrun --standalone --nproc-per-node 1 sp_046_sparse_tensor_cannot_be_staged.py

BlockingAsyncStager is to stage a sparse tensor, as a plain torch.save() would save it. Needs torch
alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

sparse = torch.eye(3).to_sparse()
expected = "a sparse tensor of the same values"
try:
    staged = BlockingAsyncStager().stage({"weight": sparse})["weight"]
    good = staged.is_sparse and torch.equal(staged.to_dense(), sparse.to_dense())
    came = expected if good else f"{staged}"
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-046 shows" if shows else "SP-046 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
