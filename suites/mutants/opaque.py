"""Faults with tensors that hold more than elements at strides. Fields as in copies.py."""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    (
        "opaque_is_sent",
        "a sparse tensor on the source raises there, and leaves the other ranks waiting",
        "offers.py",
        "if inner is None or is_opaque(inner.layout, dtype):",
        "if inner is None:",
        "opaque_tensors",
    ),
    (
        "opaque_for_nobody",
        "a sparse tensor keeps the others from landing, though no rank has a place for it",
        "broadcast.py",
        'offer.kind in ("tensor", "opaque")',
        'offer.kind == "tensor"',
        "opaque_tensors",
    ),
    (
        "opaque_for_any_target",
        "a DTensor gets a sparse tensor for its shard",
        "targets.py",
        "if value.layout is not self.layout:",
        "if False:",
        "opaque_tensors",
    ),
    (
        "opaque_lends_memory",
        "a sparse tensor that has landed changes with the full one",
        "targets.py",
        "fresh_copy(full, model.device).to(model.dtype)",
        "full.to(model.device).to(model.dtype)",
        "opaque_tensors",
    ),
    (
        "wrapper_is_sent_in_part",
        "of what a wrapper on the source holds the first tensor lands, and the rest is lost",
        "tensors.py",
        "        if len(names) != 1:\n            return None\n",
        "",
        "opaque_tensors",
    ),
    (
        "wrapper_gathered_in_part",
        "of what a wrapper holds the elements are gathered, and the rest is lost",
        "gather.py",
        "            if layout.wrapper is not None:\n",
        "            if False:\n",
        "opaque_tensors",
    ),
    (
        "wrapped_or_not_alike",
        "a wrapper is gathered as the plain tensor before it that is laid out like it",
        "leaves.py",
        "local.device, wrapper),",
        "local.device),",
        "opaque_tensors",
    ),
)
