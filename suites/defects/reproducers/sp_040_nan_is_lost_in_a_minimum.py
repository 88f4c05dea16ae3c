"""SP-040: Gloo loses NaN when it reduces a Partial('min') tensor.

    torchrun --standalone --nproc-per-node 2 sp_040_nan_is_lost_in_a_minimum.py

What breaks: a buffer is a Partial('min') of [nan, 1] on rank 0 and [1, nan] on rank 1.
  torch.minimum() gives NaN for both elements; the full state dict holds a number for one.
Why: Gloo compares values as C++ does, where every comparison with NaN is false.
For whom: users who save pending minima or maxima over Gloo, such as ranges of a quantizer: the NaN
  that shows a broken run is lost.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

values = [torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, float("nan")])]
mesh = init_device_mesh("cpu", (size,))
model = nn.Module()
model.register_buffer("lowest", DTensor.from_local(values[rank], mesh, [Partial("min")]))
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = f"a minimum of {torch.minimum(*values).tolist()}"
got = f"a minimum of {full['lowest'].tolist()}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-040 shows" if shows else "SP-040 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
