"""What is recorded as a graph: the language model over a chunk of one padded shape, and the vision tower over pictures
of one layout; and the cache that they write.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import PlacedImage, run_language_model
from vlm_local.decoding.graphs import GraphPool, StagedBuffer
from vlm_local.decoding.layout import Chunk
from vlm_local.decoding.prepared import ImageFeatures, PictureLayout
from vlm_local.decoding.recurrent import remembering, trace_paths
from vlm_local.decoding.states import begin_states


class StaticCache:
    """KV of `rows` rows of `width` columns. Plays the part of transformers' cache in a forward.

    kv: for each of the family's shapes (its layers, 2, rows, heads, width, head_dim). states: of the layers that have
        one instead, if any, with slots for num_slots nodes.
    first: column of the first node, where there are states. columns: int64 (T,) that the running forward writes.
    features: of all rows' pictures, (1 + deep levels, 1 + rows * width, hidden); those of index 0 are zero.
    """

    def __init__(self, family: Family, rows: int, width: int, num_slots: int):
        sizes = [(len(each.layers), 2, rows, each.num_heads, width, each.head_dim) for each in family.kv_shapes]
        self.kv = tuple(torch.zeros(size, dtype=family.dtype, device=family.device) for size in sizes)
        pairs = zip(family.kv_shapes, self.kv, strict=True)
        self._layers = {layer: kv[place] for shape, kv in pairs for place, layer in enumerate(shape.layers)}
        self.states = begin_states(family, rows, num_slots, is_replayed=True) if family.is_recurrent else None
        size = 1 + family.num_deep_levels, 1 + rows * width, family.embedding.weight.shape[1]
        self.features = torch.zeros(size, dtype=family.dtype, device=family.device)
        self.rows, self.width, self.num_slots, self.first = rows, width, num_slots, 0
        self.columns: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*self.kv, *(self.states.tensors if self.states else ())]

    def find_first(self, chunk: Chunk, filled: int) -> int:
        """`first` from this chunk on. filled: columns in use before it."""
        return filled + chunk.split if chunk.split else self.first

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args, **kwargs):
        """New KV (rows, heads, T, head_dim) of a layer -> all its KV (rows, heads, width, head_dim)."""
        all_keys, all_values = self._layers[layer]
        all_keys.index_copy_(2, self.columns, keys)
        all_values.index_copy_(2, self.columns, values)
        return all_keys, all_values

    def get_seq_length(self, layer: int = 0) -> int:
        """For transformers, which is told positions and masks, and asks all the same."""
        return 0


class _Numbers(NamedTuple):
    """What changes from chunk to chunk, int64: arrays on the CPU, or tensors on the device.

    token_ids (B, T), positions (axes, B, T), num_prompt and noted (B,): of the chunk. feature (B, T): index of the
    features in the cache, 0 for none. columns (T,): to write. places (B T,): to read of the flattened chunk.
    first (1,): the cache's.
    """

    token_ids: Any
    positions: Any
    num_prompt: Any
    noted: Any
    feature: Any
    columns: Any
    places: Any
    first: Any


class ChunkForward:
    """The language model over a chunk of one padded shape. length: of the chunk, T. split: as a chunk's."""

    def __init__(
        self, family: Family, cache: StaticCache, split: int, length: int, has_images: bool, graphs: GraphPool
    ):
        self._family, self._cache, self._graphs = family, cache, graphs
        self._split, self.length = split, length
        self._has_images = has_images
        grid, rows = (cache.rows, length), (cache.rows,)
        shapes = _Numbers(grid, (family.axes, *grid), rows, rows, grid, (length,), (cache.rows * length,), (1,))
        sizes = list(map(math.prod, shapes))
        self._numbers = StagedBuffer((sum(sizes),), torch.int64, family.device)  # one, to be sent at once
        ends = np.cumsum(sizes)[:-1].tolist()
        parts = zip(np.split(self._numbers.host, ends), shapes, strict=True)
        self._on_host = _Numbers(*(part.reshape(shape) for part, shape in parts))
        parts = zip(self._numbers.device.split(sizes), shapes, strict=True)
        self._on_device = _Numbers(*(part.view(shape) for part, shape in parts))
        num_masks = 1 if family.window is None else 2
        self._visible = StagedBuffer((num_masks, *grid, cache.width), torch.bool, family.device)
        self._replay: Callable[[], torch.Tensor] | None = None

    def record(self) -> Callable[[], torch.Tensor]:
        """Capture it unless that is done; what is in the buffers does not matter."""
        self._replay = self._replay or self._graphs.record(self._compute)
        return self._replay

    def run(
        self, chunk: Chunk, rows: np.ndarray, filled: int, images: Sequence[PlacedImage], places: np.ndarray
    ) -> torch.Tensor:
        """Hidden states (n, hidden) at `places` (n,) of the flattened chunk.

        rows: of the cache, for each row of the chunk. filled: columns in use before it.
        """
        self._fill(chunk, rows, filled, images, places)
        replay = self.record()
        return replay()[: len(places)]

    def _fill(
        self, chunk: Chunk, rows: np.ndarray, filled: int, images: Sequence[PlacedImage], places: np.ndarray
    ) -> None:
        count, cache, numbers = chunk.token_ids.shape[1], self._cache, self._on_host
        cache.first = cache.find_first(chunk, filled)
        self._numbers.host[:] = 0
        numbers.num_prompt[rows], numbers.noted[rows], numbers.first[:] = chunk.num_prompt, chunk.noted, cache.first
        numbers.token_ids[rows, :count] = chunk.token_ids
        numbers.positions[:, rows, :count] = chunk.positions
        numbers.columns[:] = np.minimum(filled + np.arange(self.length), cache.width - 1)
        numbers.places[: len(places)] = places
        visible = self._visible.host
        visible[:] = False
        for level, seen in enumerate(each for each in (chunk.visible, chunk.near) if each is not None):
            visible[level, rows, :count, : seen.shape[2]] = seen
        if images:
            start = 1
            for row, placed in zip(rows, images, strict=True):
                end = start + len(placed.columns)
                numbers.feature[row, placed.columns] = np.arange(start, end)
                for level, values in enumerate((placed.features.tokens, *placed.features.deep)):
                    cache.features[level, start:end] = values
                start = end
        self._numbers.send()
        self._visible.send()

    def _compute(self) -> torch.Tensor:
        family, cache, visible, numbers = self._family, self._cache, self._visible.device, self._on_device
        token_ids, positions, feature = numbers.token_ids, numbers.positions, numbers.feature
        cache.columns = numbers.columns
        embeds = family.embedding(token_ids).to(family.dtype)  # (B, T, hidden)
        deep = []
        if self._has_images:
            tokens, *levels = cache.features
            embeds = torch.where((feature > 0)[..., None], tokens[feature], embeds)
            deep = [level[feature] for level in levels]
        with self._trace(visible[0]) if cache.states else nullcontext():
            hidden = run_language_model(family, cache, token_ids, embeds, positions, list(visible), deep)
        return hidden.flatten(0, 1)[numbers.places]

    def _trace(self, visible: torch.Tensor) -> AbstractContextManager[None]:
        """For layers with states."""
        cache, split, numbers = self._cache, self._split, self._on_device
        assert cache.states is not None
        slots = torch.arange(cache.num_slots, device=visible.device)
        seen = visible[:, split:].index_select(2, (numbers.first + slots).clamp(max=cache.width - 1))
        own = (numbers.columns[split:] - numbers.first).clamp(max=cache.num_slots - 1)
        paths = trace_paths(split, numbers.num_prompt, numbers.noted, own, seen, self._family.conv_kernel)
        return remembering(self._family, cache.states, paths)


class TowerForward:
    """The vision tower over `rows` pictures of one layout."""

    def __init__(self, family: Family, layout: PictureLayout, rows: int, graphs: GraphPool):
        self._family, self._layout, self._rows = family, layout, rows
        shape = (rows * layout.shape[0], *layout.shape[1:])
        self._pixels = StagedBuffer(shape, family.dtype, family.device)
        self._replay: Callable[[], list[ImageFeatures]] = graphs.record(self._compute)

    def run(self, pixels: Sequence[torch.Tensor]) -> list[ImageFeatures]:
        """Features of each picture, and of what pads them up to `rows`. pixels: (layout's shape) each."""
        size = self._layout.shape[0]
        for row, each in enumerate(pixels):
            self._pixels.put(slice(row * size, (row + 1) * size), each)
        self._pixels.send()
        return self._replay()

    def _compute(self) -> list[ImageFeatures]:
        return self._family.encode_pixels(self._pixels.device, self._layout, self._rows)
