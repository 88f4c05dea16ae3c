"""SP-072: FSDP1 over tensor parallelism loads the optimizer moments of other rows.

    torchrun --standalone --nproc-per-node 4 sp_072_moments_of_other_rows_are_loaded.py

A weight of 8 rows lies on 2 ranks of tensor parallelism and 2 of FSDP1, two rows on each rank. A
full optimizer state is loaded, in which the moment of row n is n; each rank is to have those of its
rows. Needs torch alone. Ends with 0 where torch is right, with 1 where not.
"""

import os
import sys
import threading
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

store, rank, size = next(dist.rendezvous("env://"))
watchdog = threading.Timer(20, lambda: os._exit(print(f"rank {rank} is stuck", flush=True) or 1))
watchdog.daemon = True
watchdog.start()
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
mine = f"rows {[float(first), first + 1.0]}"
got = f"rows {state['exp_avg'].flatten().tolist()}"
expected = "the moments of this rank's rows"
came = expected if got == mine else f"those of {got} where {mine} lie"

store.set(f"rank {rank}", came)
answers = [store.get(f"rank {r}").decode() for r in range(size)]
shows = any(answer != expected for answer in answers)
if rank == 0:
    for r, answer in enumerate(answers):
        print(f"rank {r}: expected {expected}; came {answer}")
    print("SP-072 shows" if shows else "SP-072 does not show", flush=True)
    store.set("told", "")
store.wait(["told"])
sys.exit(shows)
