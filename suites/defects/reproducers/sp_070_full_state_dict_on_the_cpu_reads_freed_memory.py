"""SP-070: FSDP1 on the CPU reads freed memory for a full state dict with cpu_offload.

    torchrun --standalone --nproc-per-node 2 sp_070_full_state_dict_on_the_cpu_reads_freed_memory.py

What breaks: get_model_state_dict(full_state_dict=True, cpu_offload=True) of an FSDP1 model on the
  CPU crashes or returns garbage.
Why: FSDP1 copies its flat parameter to the CPU and frees the original. On the CPU the copy is the
  original, so FSDP1 reads memory that it has freed.
For whom: users who test or train FSDP1 on the CPU with torch before 2.14.

Needs only torch. Ends with 0 where torch is right, with 1 where not: values are wrong, or the
process ends by SIGSEGV, which torchrun reports.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = FullyShardedDataParallel(
    nn.Linear(64, 64), device_id=torch.device("cpu"), use_orig_params=True
)
expected = "a full state dict on rank 0, nothing elsewhere"
if rank == 0:  # now: the process may not live to print it later
    print(f"expected {expected}; a rank may crash instead", flush=True)
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=options)
values = sum(float(value.abs().sum()) for value in state.values())
got = expected if (values > 0) == (rank == 0) else f"values whose sum is {values}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-070 shows" if shows else "SP-070 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
