"""SP-052: a broadcast load writes the wrong elements into a _StridedShard.

    torchrun --standalone --nproc-per-node 2 sp_052_two_pieces_receive_other_elements.py

What breaks: each rank holds two separate pieces of a weight, a _StridedShard. Rank 0 broadcasts a
  full state dict, and each rank gets one contiguous piece of the same length.
Why: the load computes one offset and one length for each rank, which cannot describe two pieces.
For whom: users who flatten() a DTensor that is sharded by columns, which makes this private class
  since torch 2.12.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
placements = [_StridedShard(0, split_factor=2)]
model = nn.Module()
model.weight = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, placements, run_check=False))
full = torch.arange(8.0)
set_model_state_dict(
    model,
    {"weight": full} if rank == 0 else {},
    options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
)
wanted = f"elements {full.reshape(2, 2, 2)[:, rank].flatten().tolist()}"
held = f"elements {model.weight.to_local().tolist()}"
expected = "the elements of this rank's two pieces"
got = expected if held == wanted else f"{held} instead of {wanted}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-052 shows" if shows else "SP-052 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
