"""SP-083: FSDP1's full optimizer state on the CPU holds one of Adam's moments twice.

    torchrun --standalone --nproc-per-node 2 sp_083_one_moment_holds_the_values_of_the_other.py

What breaks: an FSDP1 model on the CPU takes a step of Adam with gradients of 4. In the full
  optimizer state with cpu_offload the first moment has the values of the second.
Why: FSDP1 gathers all moments into one buffer, and takes each out by .cpu(). On the CPU that is no
  copy, so the next moment overwrites it.
For whom: users who test or train FSDP1 on the CPU, and resume from such a checkpoint.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = FullyShardedDataParallel(
    nn.Linear(4, 4, bias=False), device_id=torch.device("cpu"), use_orig_params=True
)
optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.75))
model(torch.full((1, 4), 4.0)).sum().backward()
optimizer.step()
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_optimizer_state_dict(model, optimizer, options=options)
expected = got = "exp_avg of 2.0 and exp_avg_sq of 4.0"
if rank == 0:
    means = [state["state"]["weight"][name].mean().item() for name in ("exp_avg", "exp_avg_sq")]
    got = f"exp_avg of {means[0]} and exp_avg_sq of {means[1]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in (0,)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-083 shows" if shows else "SP-083 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
