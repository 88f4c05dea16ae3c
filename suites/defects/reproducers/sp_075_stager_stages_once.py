"""SP-075: a DefaultStager stages only once.

    torchrun --standalone --nproc-per-node 1 sp_075_stager_stages_once.py

What breaks: two calls of async_save() share one DefaultStager, to allocate its buffers only once.
  The second call raises KeyError.
Why: the stager of torch before 2.13 closes itself after the first save.
For whom: users of torch before 2.13 who save asynchronously more than once with the same stager.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
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
    got = expected
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-075 shows" if shows else "SP-075 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
