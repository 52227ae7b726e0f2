"""Attention under a mask on a CPU, where query heads share KV heads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlm_local.decoding.families import Family

_GROUPED = "sdpa_in_groups"


@contextmanager
def attend_in_groups(family: Family) -> Iterator[None]:
    """While open, a family's language model on a CPU that attends by torch's sdpa does not write its KV heads out.

    transformers copies each KV head once for every query head that shares it, where there is a mask. On a CPU that is
    a third of the attention's time over a long prompt, and torch can do without. On a GPU torch's kernels cannot.
    """
    config = family.language_model.config
    if family.device.type != "cpu" or config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(_GROUPED, _attend)
    config._attn_implementation = _GROUPED
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, heads, T, head_dim), key and value (B, KV heads, K, head_dim) -> (B, T, heads, head_dim)."""
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
    )
    return attended.transpose(1, 2).contiguous(), None
