"""SP-088: async_save() cannot save FSDP1's shards, nor a DTensor made of a slice.

    torchrun --standalone --nproc-per-node 2 sp_088_async_save_takes_an_address_for_memory.py

What breaks: async_save() of an FSDP1 model raises "torch function 'data_ptr' ... not supported for
  ShardedTensor". Of a DTensor whose local tensor is a slice it raises "Attempted to call copy_() on
  an invalid python storage". save() saves both.
Why: the stager takes a data pointer other than zero for memory of the tensor's own. A ShardedTensor
  has no pointer. That of a DTensor is its storage offset: zero, unless it was made of a slice.
For whom: users of async_save() with FSDP1, or with a loader that cuts shards out of larger tensors,
  as transformers does under tensor parallelism.

Needs a local file system that both ranks see.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

mesh = init_device_mesh("cpu", (size,))
rows = torch.arange(8.0).reshape(4, 2)[2:]
fsdp1 = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
states = {
    "a slice": {"rows": DTensor.from_local(rows, mesh, [Shard(0)])},
    "FSDP1": get_model_state_dict(fsdp1),
}
expected = "a slice: saved, FSDP1: saved"
said = []
with tempfile.TemporaryDirectory() as own:
    folder = [own]
    dist.broadcast_object_list(folder)
    for name, state in states.items():
        try:
            dcp.async_save(state, checkpoint_id=f"{folder[0]}/{name}").result()
            said.append(f"{name}: saved")
        except Exception as error:
            said.append(f"{name}: {type(error).__name__}: {str(error)[:60]}")
    dist.barrier()  # rank 0 removes the folder
got = ", ".join(said)

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-088 shows" if shows else "SP-088 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
