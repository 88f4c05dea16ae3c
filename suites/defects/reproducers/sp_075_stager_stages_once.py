"""SP-075: a DefaultStager stages once.

    torchrun --standalone --nproc-per-node 1 sp_075_stager_stages_once.py

Two async_save() in a row have one stager, so that its buffers are made once. Affects torch before
2.13. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import tempfile
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

stager = DefaultStager(
    StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=False,
    )
)
expected = "two saves"
try:
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            weight = {"weight": torch.zeros(2)}
            saved = dcp.async_save(weight, checkpoint_id=folder, async_stager=stager)
            getattr(saved, "upload_completion", saved).result()
    came = expected
except Exception as error:
    came = f"{type(error).__name__}: {str(error)[:90]}"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-075 shows" if shows else "SP-075 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
