"""SP-038: a full state dict is a plain dict without the versions of the modules.

    torchrun --standalone --nproc-per-node 1 sp_038_metadata_of_the_state_dict_is_lost.py

What breaks: state_dict() of a BatchNorm is an OrderedDict whose _metadata holds the module's
  version. get_model_state_dict(full_state_dict=True) returns a dict without it.
Why: torch builds each container anew as a plain dict, list or tuple.
For whom: users who load such a checkpoint by load_state_dict(): modules take it for one of their
  oldest version, and may convert it.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

model = nn.BatchNorm1d(2)
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = f"an OrderedDict with the metadata {model.state_dict()._metadata['']}"
metadata = getattr(full, "_metadata", {}).get("", "{}")
name = type(full).__name__
got = f"{'an' if name == 'OrderedDict' else 'a'} {name} with the metadata {metadata}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-038 shows" if shows else "SP-038 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
