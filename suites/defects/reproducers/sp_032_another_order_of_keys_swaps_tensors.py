"""SP-032: a full state dict swaps tensors when ranks list their keys in different orders.

    torchrun --standalone --nproc-per-node 2 sp_032_another_order_of_keys_swaps_tensors.py

What breaks: rank 1 registers its two weights in the opposite order. The full state dict holds the
  values of one under the name of the other.
Why: each rank gathers tensor by tensor in the order of its own dict. The first gather combines rank
  0's first tensor with rank 1's first tensor.
For whom: users whose ranks build a state dict differently, for example from a set or from files
  that arrive in another order.

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
from torch.distributed.tensor import Shard, distribute_tensor

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
weights = {
    "ones": nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)])),
    "twos": nn.Parameter(distribute_tensor(torch.full((4,), 2.0), mesh, [Shard(0)])),
}
model = nn.Module()
for name in sorted(weights, reverse=rank == 1):
    model.register_parameter(name, weights[name])
full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
expected = "ones: [1.0, 1.0, 1.0, 1.0], twos: [2.0, 2.0, 2.0, 2.0]"
got = ", ".join(f"{name}: {full[name].tolist()}" for name in sorted(full))

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-032 shows" if shows else "SP-032 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
