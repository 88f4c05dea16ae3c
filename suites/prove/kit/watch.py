"""All that prove must leave as it was: bits, objects, flags, hooks, random states, files."""

from __future__ import annotations

import os
import random
import tempfile
from typing import Any

import numpy
import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

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
        found: dict[str, Any] = {}
        for number, model in enumerate(_listed(self.job.model)):
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                found[f"bits of {number} {name}"] = _bits(tensor)
                found[f"object of {number} {name}"] = id(tensor)
                found[f"flag of {number} {name}"] = tensor.requires_grad
                found[f"gradient of {number} {name}"] = id(tensor.grad), _bits(tensor.grad)
            for name, module in model.named_modules():
                found[f"mode of {number} {name}"] = module.training
                found[f"hooks of {number} {name}"] = [
                    (key, [id(hook) for hook in hooks.values()])
                    for key, hooks in vars(module).items()
                    if key.endswith("_hooks") and isinstance(hooks, dict)
                ]
                if not isinstance(module, DistributedDataParallel):
                    found[f"attributes of {number} {name}"] = {
                        key: (id(value), _bits(value))
                        for key, value in vars(module).items()
                        if not key.startswith("_") and key != "training"
                    }
        for number, optimizer in enumerate(_listed(self.job.optimizer)):
            found[f"param_groups of {number}"] = [
                (id(group), [(k, repr(v)) for k, v in group.items() if k != "params"])
                for group in optimizer.param_groups
            ]
            found[f"defaults of {number}"] = repr(optimizer.defaults)
            found[f"state object of {number}"] = id(optimizer.state)
            for place, (param, values) in enumerate(optimizer.state.items()):
                found[f"state {number} {place}"] = id(param), id(values), list(values)
                for key, value in values.items():
                    found[f"{key} of state {number} {place}"] = id(value), _bits(value)
        found["random"] = random.getstate()
        found["torch.random"] = torch.get_rng_state().tolist()
        found["numpy.random"] = repr(numpy.random.get_state())
        found["grad mode"] = torch.is_grad_enabled()
        found["files"] = sorted(os.listdir(tempfile.gettempdir()))
        return found

    def _objects(self) -> list[Any]:
        found: list[Any] = []
        for model in _listed(self.job.model):
            params = list(model.parameters())
            found += [params, list(model.buffers()), [param.grad for param in params]]
            found += [dict(vars(module)) for module in model.modules()]
        for optimizer in _listed(self.job.optimizer):
            found += [dict(values) for values in optimizer.state.values()]
        return found


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _bits(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.is_quantized:
        value = value.int_repr()
    local = value._local_tensor if isinstance(value, DTensor) else value.detach()
    if not local.untyped_storage().nbytes():  # FSDP1's, between forwards
        return str(local.dtype), local.shape
    local = local.resolve_conj().resolve_neg()
    if local.dtype is torch.bool:
        return str(local.dtype), local.tolist()
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return str(local.dtype), local.view(width[local.element_size()]).tolist()
