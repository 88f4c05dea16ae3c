"""SP-072: FSDP1 over tensor parallelism loads the optimizer moments of the wrong rows.

    torchrun --standalone --nproc-per-node 4 sp_072_moments_of_other_rows_are_loaded.py

What breaks: a weight of 8 rows is sharded over 2 tensor-parallel ranks and 2 ranks of FSDP1, 2 rows
  on each. A full optimizer state is loaded in which the moment of row n is n. Ranks get moments of
  rows that they do not hold.
Why: FSDP1 cuts the whole moment, of all tensor-parallel ranks, by offsets into one rank's part.
For whom: users who resume training of FSDP1 over tensor parallelism: the optimizer continues with
  wrong moments, and no error is raised.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
model = nn.Sequential(nn.Linear(1, 8, bias=False))
parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
model = FullyShardedDataParallel(
    model, device_mesh=mesh["dp"], device_id=torch.device("cpu"), use_orig_params=True
)
rows = torch.arange(8.0).reshape(8, 1)
moments = {"step": torch.tensor(1.0), "exp_avg": rows, "exp_avg_sq": rows.clone()}
optimizer = torch.optim.Adam(model.parameters())
group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
full = {"state": {"0.weight": moments}, "param_groups": [{**group, "params": ["0.weight"]}]}
set_optimizer_state_dict(model, optimizer, full, options=StateDictOptions(full_state_dict=True))
(state,) = optimizer.state.values()
first = 4 * mesh["tp"].get_local_rank() + 2 * mesh["dp"].get_local_rank()
wanted = f"rows {[float(first), first + 1.0]}"
held = f"rows {state['exp_avg'].flatten().tolist()}"
expected = "the moments of this rank's rows"
got = expected if held == wanted else f"the moments of {held} instead of {wanted}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-072 shows" if shows else "SP-072 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
