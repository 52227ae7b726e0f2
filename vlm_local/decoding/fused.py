"""Layers that torch.compile has fused, for forwards that become CUDA graphs.

A captured layer of Qwen2-VL's language model is 27 kernels, and most of them take a few microseconds whatever they
move. Compiled, what stands between two matrix products is one kernel. A layer is compiled once and serves for all
that are alike, at all lengths.
"""

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention.flex_attention import flex_attention

from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import attending_by

_TREE = "flex_over_a_tree"
_PIECES = "flash_in_pieces"  # Qwen's towers tell where a picture ends only to an attention with "flash" in its name
# layer_idx is a number like others, or each layer would be compiled; one row and several are two forms of a layer.
_DYNAMO = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 32, "suppress_errors": True}


class FusedLayers:
    """Compiled forwards of one model's layers, compiled when they first run."""

    def __init__(self, family: Family):
        on_gpu = family.device.type == "cuda"
        backend = "inductor" if on_gpu else "eager"  # on a CPU traced and not compiled: for tests
        self._layers = [*family.language_model.layers, *family.vision_layers]
        self._forwards = {
            kind: torch.compile(inspect.unwrap(kind.forward), dynamic=True, backend=backend)
            for kind in {type(layer) for layer in self._layers}
        }
        self._attentions = [
            *([(family.language_model.config, _TREE, attend_over_tree)] if on_gpu else []),
            *([(family.vision_config, _PIECES, attend_in_pieces)] if family.axes == 3 else []),
        ]

    @contextmanager
    def running(self) -> Iterator[None]:
        """While open, the model's layers run compiled; one that cannot be compiled runs as it is, with a warning."""
        with ExitStack() as stack:
            stack.enter_context(torch._dynamo.config.patch(_DYNAMO))
            for attention in self._attentions:
                stack.enter_context(attending_by(*attention))
            for layer in self._layers:
                layer.forward = functools.partial(self._forwards[type(layer)], layer)
                stack.callback(delattr, layer, "forward")
            yield


def attend_over_tree(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As torch's sdpa under a mask, without a copy of each KV head for every query head that shares it.

    query (B, heads, T, head_dim), key and value (B, KV heads, K, head_dim), attention_mask (B, 1, T, K), added to
    the scores -> (B, T, heads, head_dim).
    """

    def add_mask(score, batch, head, row, column):
        return score + attention_mask[batch, 0, row, column]

    shares = query.shape[1] != key.shape[1]
    attended = flex_attention(query, key, value, score_mod=add_mask, scale=scaling, enable_gqa=shares)
    assert isinstance(attended, torch.Tensor)  # no log-sum was asked for
    return attended.transpose(1, 2).contiguous(), None


def attend_in_pieces(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    pictures: int = 1,
    windows: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Each of `pictures` pictures of one layout attends to itself, within `windows` in the layers that have them.

    query, key, value (1, heads, pictures * n, head_dim) -> (1, pictures * n, heads, head_dim). cu_seq_lens_q: where
    sequences begin; only how many there are is looked at. windows: int (n,), the window of each patch of a picture.
    """
    assert cu_seq_lens_q is not None
    mask = None
    if windows is not None and len(cu_seq_lens_q) - 1 != pictures:
        mask = windows[:, None] == windows[None]
    one, other, third = (each[0].unflatten(1, (pictures, -1)).transpose(0, 1) for each in (query, key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(one, other, third, attn_mask=mask, scale=scaling)
    return attended.transpose(1, 2).flatten(0, 1)[None], None
