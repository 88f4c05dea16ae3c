"""SP-037: a saved state dict shares memory with the model, and changes when training continues.

    torchrun --standalone --nproc-per-node 1 sp_037_saved_state_changes_with_training.py

What breaks: the full state dict of a model on the CPU is taken with cpu_offload=True. The next
  optimizer step changes the saved weight.
Why: there is nothing to gather and nothing to move, and .to('cpu') of a CPU tensor returns the same
  tensor.
For whom: users who keep a state dict on the CPU while training continues, as for asynchronous
  saving or for the best model so far.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.Linear(2, 2, bias=False)
nn.init.ones_(model.weight)
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
saved = get_model_state_dict(model, options=options)
expected = f"a saved weight of {saved['weight'].tolist()}"
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
got = f"a saved weight of {saved['weight'].tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-037 shows" if shows else "SP-037 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
