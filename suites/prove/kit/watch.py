"""All that prove must leave as it was: bits, objects, flags, hooks, random states, files."""

from __future__ import annotations

import os
import random
import tempfile
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from prove.kit.jobs import Job


class State:
    """What a job is now, held by other means than prove's."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.before = self._now()
        self.held = self._objects()
        """So that no identity is given to another object."""

    def differences(self) -> list[str]:
        """What is not as it was."""
        now = self._now()
        keys = self.before.keys() | now.keys()
        return sorted(str(key) for key in keys if self.before.get(key) != now.get(key))

    def _now(self) -> dict[str, Any]:
        model, optimizer = self.job.model, self.job.optimizer
        found: dict[str, Any] = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            found[f"bits of {name}"] = _bits(tensor)
            found[f"object of {name}"] = id(tensor)
            found[f"flag of {name}"] = tensor.requires_grad
            found[f"gradient of {name}"] = id(tensor.grad), _bits(tensor.grad)
        for name, module in model.named_modules():
            found[f"mode of {name}"] = module.training
            found[f"hooks of {name}"] = [
                (key, [id(hook) for hook in hooks.values()])
                for key, hooks in vars(module).items()
                if key.endswith("_hooks") and isinstance(hooks, dict)
            ]
        if optimizer is not None:
            found["param_groups"] = [
                (id(group), [(k, repr(v)) for k, v in group.items() if k != "params"])
                for group in optimizer.param_groups
            ]
            found["state object"] = id(optimizer.state)
            for number, (param, values) in enumerate(optimizer.state.items()):
                found[f"state {number}"] = id(param), id(values), list(values)
                for key, value in values.items():
                    found[f"{key} of state {number}"] = id(value), _bits(value)
        found["random"] = random.getstate()
        found["torch.random"] = torch.get_rng_state().tolist()
        found["grad mode"] = torch.is_grad_enabled()
        found["files"] = sorted(os.listdir(tempfile.gettempdir()))
        return found

    def _objects(self) -> list[Any]:
        model, optimizer = self.job.model, self.job.optimizer
        found = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
        return [found, [dict(v) for v in optimizer.state.values()] if optimizer else None]


def _bits(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    local = value._local_tensor if isinstance(value, DTensor) else value.detach()
    if local.dtype is torch.bool:
        return str(local.dtype), local.tolist()
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return str(local.dtype), local.view(width[local.element_size()]).tolist()
