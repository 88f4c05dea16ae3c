"""SP-024: torch.distributed.tensor.parallel.fsdp cannot be the first import.

    torchrun --standalone --nproc-per-node 1 sp_024_module_cannot_be_the_first_import.py

A new process imports the module before all others. Needs torch alone. Ends with 0 where torch is
right, with 1 where not.
"""

import os
import subprocess
import sys
import threading
from datetime import timedelta

import torch.distributed as dist

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

first = "import torch.distributed.tensor.parallel.fsdp"
done = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, check=False)
expected = "no error"
came = done.stderr.strip().rpartition("\n")[2][:120] or expected

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-024 shows" if shows else "SP-024 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
