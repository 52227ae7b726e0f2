"""The tensor work: a chunk of tokens through the language model, and the rows of the head that count.

No branch here depends on a tensor's values, and nothing is read back to the CPU, so that the whole
file runs on a GPU without a stop, and under fake tensors without a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlm_local.decoding.families import WITH_STATE, Family
from vlm_local.decoding.layout import Chunk
from vlm_local.decoding.prepared import ImageFeatures

_GROUPED = "sdpa_in_groups"


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """One row's image features and where they go: columns (n,) of the chunk."""

    features: ImageFeatures
    columns: np.ndarray


@dataclass(frozen=True, eq=False)
class Kept:
    """What the first n columns of a row leave to later ones.

    kv: for each of the family's shapes (its layers, 2, heads, n, head_dim). memory, tail: of the layers with a state,
        the state behind exactly these columns, (layers, heads, key dim, value dim) and (layers, kernel - 1, channels);
        None without such.
    """

    kv: tuple[torch.Tensor, ...]
    memory: torch.Tensor | None = None
    tail: torch.Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.kv[0].shape[3]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self.kv, self.memory, self.tail) if each is not None)

    def cut(self, count: int) -> "Kept | None":
        """Of the first `count` columns. None for no column, and where the state is one behind more of them."""
        if self.memory is not None:
            return self if count == self.num_columns else None
        return Kept(tuple(each[:, :, :, :count] for each in self.kv)) if count else None


class DynamicKV:
    """KV of some rows that grows with every chunk: as many columns as there are tokens, and no more.

    filled: how many columns there are. align: as `lay_out` takes it.
    """

    align: int | None = None

    def __init__(self, family: Family, kept: Sequence[Kept | None]):
        """kept: for each row what it begins with, or None."""
        self._family = family
        self._cache = DynamicCache()  # without a config: layers with a sliding window keep all columns, too
        self.filled = max((each.num_columns for each in kept if each), default=0)
        if self.filled:
            self._begin(kept)

    def _begin(self, kept: Sequence[Kept | None]) -> None:
        shapes = self._family.kv_shapes
        layers = [DynamicLayer() for _ in range(1 + max(shape.layers[-1] for shape in shapes))]
        for number, shape in enumerate(shapes):
            stacked = _stack_rows([each and each.kv[number] for each in kept], self.filled)
            for index, (keys, values) in zip(shape.layers, stacked, strict=True):
                layers[index].lazy_initialization(keys, values)
                layers[index].keys, layers[index].values = keys, values
        self._cache.layers.extend(layers)

    def run(self, chunk: Chunk, images: Sequence[PlacedImage], picks: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Append a chunk. Returns hidden states (n, hidden) behind the last norm, for each row those at
        its `picks` (n,), columns of the chunk.

        images: of each row in order, where the chunk holds their placeholders; else empty.
        """
        family = self._family
        token_ids = torch.as_tensor(chunk.token_ids, device=family.device)
        positions = torch.as_tensor(chunk.positions, device=family.device)
        embeds = family.embedding(token_ids).to(family.dtype)  # (B, T, hidden)
        levels: list[torch.Tensor] = []
        if images:
            deep = zip(*(placed.features.deep for placed in images), strict=True)
            levels = [_insert(torch.zeros_like(embeds), images, level) for level in deep]
            embeds = _insert(embeds, images, [placed.features.tokens for placed in images])
        masks = [each for each in (chunk.visible, chunk.near) if each is not None]
        visible = [torch.as_tensor(each, device=family.device) for each in masks]
        hidden = run_language_model(family, self._cache, token_ids, embeds, positions, visible, levels)
        self.filled += chunk.token_ids.shape[1]
        return [
            hidden[row].index_select(0, torch.as_tensor(columns, device=hidden.device))
            for row, columns in enumerate(picks)
        ]

    def copy_columns(self, row: int, columns: np.ndarray) -> Kept:
        """What a row's `columns` (n,) leave, in memory of its own. Where there are states, they are its first."""
        layers: Any = self._cache.layers  # each with keys and values (B, heads, K, head_dim) once it was written to
        index = torch.as_tensor(columns, device=self._family.device)
        kv = []
        for shape in self._family.kv_shapes:
            own = [layers[place] for place in shape.layers]
            pairs = [torch.stack([layer.keys[row], layer.values[row]]).index_select(2, index) for layer in own]
            kv.append(torch.stack(pairs))
        return Kept(tuple(kv))

    def narrow(self, rows: np.ndarray) -> None:
        """Go on with these rows."""
        self._cache.batch_select_indices(torch.as_tensor(rows, device=self._family.device))


def _stack_rows(kept: Sequence[torch.Tensor | None], filled: int) -> torch.Tensor:
    """(layers, 2, B, heads, filled, head_dim), zeros behind what a row has.

    A single row is not copied: a cache layer appends to a copy of its own and never writes into what it began with.
    """
    pattern = next(each for each in kept if each is not None)
    if len(kept) == 1:
        return pattern[:, :, None]
    layers, _, heads, _, head_dim = pattern.shape
    stacked = pattern.new_zeros((layers, 2, len(kept), heads, filled, head_dim))
    for row, each in enumerate(kept):
        if each is not None:
            stacked[:, :, row, :, : each.shape[3]] = each
    return stacked


def run_language_model(
    family: Family,
    cache,
    token_ids: torch.Tensor,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    visible: Sequence[torch.Tensor],
    deep: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Tokens (B, T) and embeddings (B, T, hidden), pictures' among them -> hidden states (B, T, hidden) behind the last
    norm; the cache takes their KV.

    positions: int64 (axes, B, T). visible: bool (B, T, K) who sees whom; a second one within the sliding
    window where the family has it. deep: (B, T, hidden) to add behind each of the first layers.
    """
    masks = [_build_mask(family, each) for each in visible]
    mask: Any = {"full_attention": masks[0], "sliding_attention": masks[1]} if len(masks) > 1 else masks[0]
    if family.is_recurrent:
        mask = {"full_attention": mask, **dict.fromkeys(WITH_STATE)}
    with _attending_in_groups(family), _added_behind_layers(family, deep):
        return family.language_model(
            inputs_embeds=embeds,
            position_ids=positions if family.axes > 1 else positions[0],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **family.list_inputs(token_ids),
        ).last_hidden_state


def _build_mask(family: Family, visible: torch.Tensor) -> torch.Tensor:
    """bool (B, T, K) -> what is added to attention scores (B, 1, T, K). Finite, so that a row of
    padding, which sees nothing, gives no NaN.
    """
    scores = torch.zeros(visible.shape, dtype=family.dtype, device=family.device)
    return scores.masked_fill_(~visible, torch.finfo(family.dtype).min)[:, None]


def _insert(base: torch.Tensor, images: Sequence[PlacedImage], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, T, hidden) with each row's `values` in its image's places."""
    length = base.shape[1]
    places = np.concatenate([row * length + placed.columns for row, placed in enumerate(images)])
    index = torch.as_tensor(places, device=base.device)
    return base.flatten(0, 1).index_copy(0, index, torch.cat(list(values))).view_as(base)


@contextmanager
def _added_behind_layers(family: Family, added: Sequence[torch.Tensor]) -> Iterator[None]:
    """Qwen3-VL adds deep image features behind the first layers of the language model.

    Its own way is to index with a mask, whose count a GPU must be stopped to read.
    """
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, each=each: output + each)
        for layer, each in zip(family.language_model.layers, added, strict=False)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attending_in_groups(family: Family) -> AbstractContextManager[None]:
    """While open, a family's language model on a CPU that attends by torch's sdpa does not write its KV heads out.

    transformers copies each KV head once for every query head that shares it, where there is a mask. On a CPU that is
    a third of the attention's time over a long prompt, and torch can do without. On a GPU torch's kernels cannot.
    """
    on_cpu = family.device.type == "cpu"
    return attending_by(family.language_model.config, _GROUPED, _attend) if on_cpu else nullcontext()


@contextmanager
def attending_by(config: Any, name: str, attend: Callable[..., tuple[torch.Tensor, None]]) -> Iterator[None]:
    """While open, a model of this configuration that attends by torch's sdpa attends by `attend`, which transformers
    knows as `name`; one with an attention of its own keeps it.
    """
    if config._attn_implementation != "sdpa":
        yield
        return
    AttentionInterface.register(name, attend)
    config._attn_implementation = name
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
