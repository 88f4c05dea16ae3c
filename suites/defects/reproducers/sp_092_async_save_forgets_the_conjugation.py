"""SP-092: async_save() saves other values than a conjugated or negated view has.

    torchrun --standalone --nproc-per-node 1 sp_092_async_save_forgets_the_conjugation.py

What breaks: a state dict holds z.conj(), and the imaginary part of it. What async_save() has
  written is loaded again: it is z, and the imaginary part of z. save() saves both right.
Why: conj() changes no memory, but marks that the bits are to be read conjugated. The stager of
  async_save() copies the bits and loses the mark.
For whom: users of async_save() who keep complex values, for instance spectra or their parts.

Needs only torch. Ends with 0 where torch is right, with 1 where not.
"""

import faulthandler
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

store, rank, size = next(dist.rendezvous("env://"))
store.set(f"ready {rank}", "")
store.wait([f"ready {r}" for r in range(size)])  # so that the limits below time no import
faulthandler.dump_traceback_later(20, exit=True)  # a rank that hangs ends with 1
limit = timedelta(seconds=5)
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)

spectrum = torch.tensor([1.0 + 2.0j, 3.0 - 4.0j])
state = {"conjugate": spectrum.conj(), "imaginary": spectrum.conj().imag}
expected = f"{[value.tolist() for value in state.values()]}"
found = {name: torch.zeros(2, dtype=value.dtype) for name, value in state.items()}
with tempfile.TemporaryDirectory() as folder:
    dcp.async_save(state, checkpoint_id=folder).result()
    dcp.load(found, checkpoint_id=folder)
got = f"{[value.tolist() for value in found.values()]}"

# The store answers even after a collective has failed.
store.set(f"rank {rank}", got)
answers = {r: store.get(f"rank {r}").decode() for r in range(size)}
shows = any(answer != expected for answer in answers.values())
if rank == 0:
    for r, answer in answers.items():
        print(f"rank {r}: expected {expected}; got {answer}")
    print("SP-092 shows" if shows else "SP-092 does not show", flush=True)
    store.set("printed", "")
store.wait(["printed"])  # torchrun ends the other ranks as soon as one ends with 1
sys.exit(1 if shows else 0)
