"""SP-065: simulated ranks cannot load a full state dict.

    torchrun --standalone --nproc-per-node 1 sp_065_simulated_ranks_cannot_load.py

What breaks: one process simulates two ranks by LocalTensorMode. Loading a full state dict into a
  sharded parameter raises.
Why: the load broadcasts pickled Python objects and computes offsets for one rank. A simulated
  process has a value for each rank.
For whom: users who test distributed code in one process by LocalTensorMode, which is in a private
  module.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

dist.destroy_process_group()
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))
expected = "a whole weight of [[0.0, 1.0], [2.0, 3.0]]"
try:
    with LocalTensorMode(2):
        model = nn.Module()
        model.weight = nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Shard(0)]))
        set_model_state_dict(
            model,
            {"weight": torch.arange(4.0).reshape(2, 2)},
            options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        whole = model.weight.full_tensor().reconcile()
    got = f"a whole weight of {whole.tolist()}"
except Exception as error:
    got = f"{type(error).__name__}: {str(error)[:90]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-065 shows" if shows else "SP-065 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
