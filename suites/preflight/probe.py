"""Print what torch says of itself and of its GPUs, as JSON; run as a process of its own.

To ask which GPUs reach each other torch makes a context on them, which no parent of ranks may hold,
and a broken driver may hang or kill the process that asks.
"""

from __future__ import annotations

import json
from typing import Any


def probe() -> dict[str, Any]:
    """Versions, backends, and of each GPU its name and the GPUs that it reads directly."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda
    count = cuda.device_count()
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, cuda.nccl.version())) if dist.is_nccl_available() else None,
        "backends": [
            b
            for b in dist.Backend.backend_list
            if b != "undefined" and dist.is_backend_available(b)
        ],
        "default_backend": dict(dist.Backend.default_device_backend_map),
        "gpus": [cuda.get_device_name(i) for i in range(count)],
        "peers": [
            [j for j in range(count) if j != i and cuda.can_device_access_peer(i, j)]
            for i in range(count)
        ],
    }


if __name__ == "__main__":
    print(json.dumps(probe()))
