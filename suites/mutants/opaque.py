"""Faults with sparse and quantized full tensors. Fields as in copies.py."""

from __future__ import annotations

FAULTS: tuple[tuple[str, ...], ...] = (
    (
        "opaque_is_sent",
        "a sparse tensor on the source raises there, and leaves the other ranks waiting",
        "offers.py",
        "if not ordinary and is_opaque(plain.layout, dtype):",
        "if False:",
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
)
