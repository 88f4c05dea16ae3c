"""SP-024: torch.distributed.tensor.parallel.fsdp cannot be the first import.

    torchrun --standalone --nproc-per-node 1 sp_024_module_cannot_be_the_first_import.py

What breaks: a new process imports this module before any other module of torch, and gets an
  ImportError.
Why: the module imports torch.distributed.fsdp, whose initialization imports DTensorExtensions from
  the same, unfinished module.
For whom: users who import from torch.distributed.tensor.parallel.fsdp before
  torch.distributed.fsdp.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import subprocess
import sys
from datetime import timedelta

import torch.distributed as dist

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(40, exit=True)  # importing torch is slow; a hang ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

first = "import torch.distributed.tensor.parallel.fsdp"
done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, check=False)
expected = "no error"
got = done.stderr.strip().rpartition("\n")[2][:120] or expected

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-024 shows" if shows else "SP-024 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
