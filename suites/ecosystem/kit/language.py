"""A tiny causal language model with tied embeddings, as transformers builds it, and its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

ROWS, LENGTH, WORDS = 8, 6, 64


def llama(salt: int = 0) -> Any:
    """The same numbers on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=WORDS,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    torch.manual_seed(salt)
    return LlamaForCausalLM(config)


def text(number: int, data: DeviceMesh | None) -> torch.Tensor:
    """This rank's rows of a batch."""
    generator = torch.Generator().manual_seed(100 + number)
    rows = torch.randint(WORDS, (ROWS, LENGTH), generator=generator)
    return rows if data is None else rows.chunk(data.size())[data.get_local_rank()]


def mean(losses: list[torch.Tensor], data: DeviceMesh | None) -> list[torch.Tensor]:
    """Over the ranks that hold other rows."""
    found = []
    for loss in losses:
        total = loss.clone()
        if data is not None:
            torch.distributed.all_reduce(total, group=data.get_group())
            total /= data.size()
        found.append(total)
    return found
