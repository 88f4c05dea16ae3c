"""Which operations are for the kind of tensor, and not yet what it makes of them."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def desugars(types: Iterable[type]) -> bool:
    """Whether a kind of tensor makes operations of its own of this one, as a DTensor does.

    They come to a mode only where it leaves this one to that kind.
    """
    plain = torch.Tensor.__torch_dispatch__
    return any(getattr(kind, "__torch_dispatch__", plain) != plain for kind in types)
