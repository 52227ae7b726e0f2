"""What is recorded as a graph: the language model over a chunk of one padded shape, and the vision tower over pictures
of one layout; and the cache that they write.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

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


class Step:
    """The language model over a chunk of one padded shape. length: of the chunk, T. split: as a chunk's."""

    def __init__(
        self, family: Family, cache: StaticCache, split: int, length: int, has_images: bool, graphs: GraphPool
    ):
        self._family, self._cache, self._graphs = family, cache, graphs
        self._split_at, self.length = split, length
        self._has_images = has_images
        rows, width, num_masks = cache.rows, cache.width, 1 if family.window is None else 2
        num_numbers = (2 + family.axes) * rows * length + length + rows * length + 2 * rows + 1  # as `_split` has them
        self._numbers = StagedBuffer((num_numbers,), torch.int64, family.device)
        self._visible = StagedBuffer((num_masks, rows, length, width), torch.bool, family.device)
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

    def _split(self, numbers) -> tuple:
        """The flat numbers -> token ids, index of the features (0: none) (B, T), positions (axes, B, T); columns to
        write (T,), places to read (B T,); for states the chunk's num_prompt, noted (B,), the column of the first
        node (1,).
        """
        axes, rows, length = self._family.axes, self._cache.rows, self.length
        size = rows * length
        grid = numbers[: (2 + axes) * size].reshape(2 + axes, rows, length)
        rest = numbers[(2 + axes) * size :]
        columns, read, counts = rest[:length], rest[length : length + size], rest[length + size :]
        return grid[0], grid[1], grid[2:], columns, read, counts[:rows], counts[rows:-1], counts[-1:]

    def _fill(
        self, chunk: Chunk, rows: np.ndarray, filled: int, images: Sequence[PlacedImage], places: np.ndarray
    ) -> None:
        count = chunk.token_ids.shape[1]
        self._cache.first = self._cache.find_first(chunk, filled)
        numbers = self._numbers.host
        numbers[:] = 0
        token_ids, feature, positions, columns, read, num_prompt, noted, first = self._split(numbers)
        num_prompt[rows], noted[rows], first[:] = chunk.num_prompt, chunk.noted, self._cache.first
        token_ids[rows, :count] = chunk.token_ids
        positions[:, rows, :count] = chunk.positions
        columns[:] = np.minimum(filled + np.arange(self.length), self._cache.width - 1)
        read[: len(places)] = places
        visible = self._visible.host
        visible[:] = False
        for level, seen in enumerate(each for each in (chunk.visible, chunk.near) if each is not None):
            visible[level, rows, :count, : seen.shape[2]] = seen
        if images:
            start = 1
            for row, placed in zip(rows, images, strict=True):
                end = start + len(placed.columns)
                feature[row, placed.columns] = np.arange(start, end)
                for level, values in enumerate((placed.features.tokens, *placed.features.deep)):
                    self._cache.features[level, start:end] = values
                start = end
        self._numbers.send()
        self._visible.send()

    def _compute(self) -> torch.Tensor:
        family = self._family
        cache, visible = self._cache, self._visible.device
        token_ids, feature, positions, cache.columns, read, *counts = self._split(self._numbers.device)
        embeds = family.embedding(token_ids).to(family.dtype)  # (B, T, hidden)
        deep = []
        if self._has_images:
            tokens, *levels = cache.features
            embeds = torch.where((feature > 0)[..., None], tokens[feature], embeds)
            deep = [level[feature] for level in levels]
        with self._trace(visible[0], *counts) if cache.states else nullcontext():
            hidden = run_language_model(family, cache, token_ids, embeds, positions, list(visible), deep)
        return hidden.flatten(0, 1)[read]

    def _trace(
        self, visible: torch.Tensor, num_prompt: torch.Tensor, noted: torch.Tensor, first: torch.Tensor
    ) -> AbstractContextManager[None]:
        """For layers with states."""
        cache, split = self._cache, self._split_at
        assert cache.states is not None
        slots = torch.arange(cache.num_slots, device=visible.device)
        seen = visible[:, split:].index_select(2, (first + slots).clamp(max=cache.width - 1))
        own = (cache.columns[split:] - first).clamp(max=cache.num_slots - 1)
        return remembering(
            self._family, cache.states, trace_paths(split, num_prompt, noted, own, seen, self._family.conv_kernel)
        )


class Tower:
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
