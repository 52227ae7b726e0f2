"""The tensor work: a chunk of tokens through the language model, and the rows of the head that count.

No branch here depends on a tensor's values, and nothing is read back to the CPU, so that the whole
file runs on a GPU without a stop, and under fake tensors without a GPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from vlm_local.decoding.families import Family, ImageFeatures
from vlm_local.decoding.layout import Chunk

# Of each layer: keys and values (heads, n, head_dim).
LayerKV = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Placed:
    """One row's image features and where they go: columns (n,) of the chunk."""

    features: ImageFeatures
    columns: np.ndarray


def open_cache(family: Family, kept: Sequence[Sequence[LayerKV]]) -> DynamicCache:
    """A cache that begins with what is kept of each row, padded to the longest; empty where none is."""
    cache = DynamicCache()  # without a config: layers with a sliding window keep all columns, too
    length = max((layers[0][0].shape[1] for layers in kept if layers), default=0)
    if length == 0:
        return cache
    pattern = next(layers for layers in kept if layers)
    for index, (keys, _) in enumerate(pattern):
        shape = (len(kept), keys.shape[0], length, keys.shape[2])
        stacked = keys.new_zeros(shape), keys.new_zeros(shape)
        for row, layers in enumerate(kept):
            if layers:
                count = layers[index][0].shape[1]
                stacked[0][row, :, :count] = layers[index][0]
                stacked[1][row, :, :count] = layers[index][1]
        cache.update(*stacked, index)
    return cache


def copy_columns(cache: DynamicCache, row: int, columns: np.ndarray) -> list[LayerKV]:
    """A row's KV at `columns`, in memory of its own."""
    index = torch.as_tensor(columns, device=cache.layers[0].keys.device)
    return [
        (layer.keys[row].index_select(1, index), layer.values[row].index_select(1, index)) for layer in cache.layers
    ]


def run_chunk(family: Family, cache: DynamicCache, chunk: Chunk, images: Sequence[Placed] = ()) -> torch.Tensor:
    """Append a chunk to the cache. Returns hidden states (B, T, hidden) behind the last norm.

    images: of each row in order, where the chunk holds their placeholders.
    """
    token_ids = torch.as_tensor(chunk.token_ids, device=family.device)
    positions = torch.as_tensor(chunk.positions, device=family.device)
    embeds = family.embedding(token_ids).to(family.dtype)  # (B, T, hidden)
    if images:
        embeds = _insert(embeds, images, [placed.features.tokens for placed in images])
    mask = _build_mask(family, chunk.visible)
    if chunk.near is not None:
        mask = {"full_attention": mask, "sliding_attention": _build_mask(family, chunk.near)}
    with _deep_features(family, embeds, images):
        return family.language_model(
            inputs_embeds=embeds,
            position_ids=positions if family.axes > 1 else positions[0],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state


def pick_columns(hidden: torch.Tensor, row: int, columns: np.ndarray) -> torch.Tensor:
    """Hidden states (n, hidden) of one row at `columns` (n,) of the chunk."""
    return hidden[row].index_select(0, torch.as_tensor(columns, device=hidden.device))


def _build_mask(family: Family, visible: np.ndarray) -> torch.Tensor:
    """bool (B, T, K) -> what is added to attention scores (B, 1, T, K). Finite, so that a row of
    padding, which sees nothing, gives no NaN.
    """
    hidden = torch.as_tensor(~visible, device=family.device)[:, None]
    return torch.zeros(hidden.shape, dtype=family.dtype, device=family.device).masked_fill_(
        hidden, torch.finfo(family.dtype).min
    )


def _insert(base: torch.Tensor, images: Sequence[Placed], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, T, hidden) with each row's `values` in its image's places."""
    length = base.shape[1]
    places = np.concatenate([row * length + placed.columns for row, placed in enumerate(images)])
    index = torch.as_tensor(places, device=base.device)
    return base.flatten(0, 1).index_copy(0, index, torch.cat(list(values))).view_as(base)


@contextmanager
def _deep_features(family: Family, embeds: torch.Tensor, images: Sequence[Placed]) -> Iterator[None]:
    """Add Qwen3-VL's deep image features behind the first layers of the language model.

    Its own way is to index with a mask, whose count a GPU must be stopped to read.
    """
    levels = zip(*(placed.features.deep for placed in images), strict=True)
    hooks = []
    for layer, level in zip(family.language_model.layers, levels, strict=False):
        added = _insert(torch.zeros_like(embeds), images, level)
        hooks.append(layer.register_forward_hook(lambda module, inputs, output, added=added: output + added))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Head:
    """The rows of the output head that a trie can choose from, in float32."""

    def __init__(self, family: Family, live_tokens: np.ndarray):
        self._live = torch.as_tensor(live_tokens, device=family.device)
        self._full = family.head
        self._softcap = family.softcap
        weight = family.head.weight
        self._rows = weight[self._live].float() if weight.is_floating_point() else None  # quantised: use it whole

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, hidden) -> float32 logits (n, V) of the live tokens."""
        if self._rows is None:
            logits = self._full(hidden).float().index_select(1, self._live)
        else:
            logits = torch.nn.functional.linear(hidden.float(), self._rows)
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits
