"""Forwards in buffers of fixed shape, so that a GPU can replay them as one recorded graph.

On a GPU most of a step is not arithmetic: thousands of small kernels are launched one by one, and
kernels are chosen anew for every new shape. Here every size is rounded up to one of a few, what changes
from step to step is copied into buffers that stay where they are, and what was computed in them once
is captured as a CUDA graph and replayed. Padding is seen by nobody. On the CPU the same code runs
without capture, which is how tests compare it with forward.py.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from vlm_local.decoding.experts import has_experts, has_kernel
from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import DynamicKV, Kept, PlacedImage
from vlm_local.decoding.fused import FusedLayers
from vlm_local.decoding.graphs import GraphPool
from vlm_local.decoding.layout import Chunk
from vlm_local.decoding.padded import ChunkForward, StaticCache, TowerForward
from vlm_local.decoding.prepared import ImageFeatures, PictureLayout, PreparedRequest, encode_by_layout, take_pixels
from vlm_local.decoding.recurrent import BLOCK, RecurrentKV

MAX_ROWS = 16  # more requests at once run in forward.py
MAX_COLUMNS = 2048  # longer prompts, too
WIDTH = 512  # columns of the narrowest buffer; others have a multiple
MAX_CAPTURED = 4  # of pictures, each with towers of its own; whoever sends more shapes gets no more memory of the GPU
RESERVE = 512  # columns for nodes behind a prompt, unless all are wanted: all that the fast posterior reads on a GPU
SLOTS = RESERVE + 64  # of a state: these nodes, and padding
# Captured with the first request, so that no robot waits for it: chunks with a picture, and what follows them.
_LONGEST_FIRST, _LONGEST_NEXT = 768, 256
_DRAFT = 320  # nodes in the first chunk of a model with states, as the fast posterior wants them on a GPU


def can_capture(family: Family) -> bool:
    """Whether a forward on this GPU can become a graph, in which no value may be read back from the GPU.

    Experts without a kernel of their own read values back. So do bitsandbytes' 8-bit layers: they look for columns
    that outgrow 8 bits.
    """
    if any(weight.dtype == torch.int8 for weight in family.language_model.parameters()):
        return False
    return not has_experts(family.language_model.config) or has_kernel(family.device, family.dtype)


def round_up(count: int, rows: int = 1) -> int:
    """The next of the few lengths that chunks are padded to: 16 more each time, then 64, then 256; for
    several rows 128, then 256, because each length is a graph for each number of rows.
    """
    step = 256 if count > 512 else 128 if rows > 1 else 64 if count > 64 else 16
    return step * math.ceil(count / step)


def round_rows(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


class StaticForwards:
    """One model's buffers and graphs, made when they are first needed and kept. Not for several threads."""

    def __init__(self, family: Family, captures: bool, max_batch: int = 1, fused: FusedLayers | None = None):
        """captures: record and replay CUDA graphs; else every forward runs operation by operation. fused: what its
        layers run in, None for layers as they are.

        max_batch: for so many rows the usual graphs are captured as soon as the first request shows how long
        prompts are; others when they are first needed.
        """
        self.family = family
        # Largest first: the smaller graphs then find room in the memory that it has left in the pool.
        self._usual_rows = sorted({round_rows(count) for count in range(1, min(max_batch, MAX_ROWS) + 1)}, reverse=True)
        self._captures = captures
        self._graphs = GraphPool(captures, fused.running) if fused else GraphPool(captures)
        self._caches: dict[tuple[int, int], StaticCache] = {}
        self._chunks: dict[tuple, ChunkForward] = {}
        self._towers: dict[PictureLayout, dict[int, TowerForward]] = {}
        self.counts = {"eager_pictures": 0, "eager_size": 0, "grown": 0}

    @property
    def metadata(self) -> dict[str, int]:
        """captured, uncaptured: graphs, and forwards that could not become one. kv_bytes: of all KV and states.
        eager_pictures, eager_size: batches of requests that ran without these buffers, because earlier pictures had
        to be read, or because of too many rows or columns. grown: those that left them for want of columns.
        """
        kv_bytes = sum(each.nbytes for cache in self._caches.values() for each in cache.tensors)
        return {
            "captured": self._graphs.captured,
            "uncaptured": self._graphs.uncaptured,
            "kv_bytes": kv_bytes,
            **self.counts,
        }

    def open(self, kept: Sequence[Kept | None], num_columns: int, has_unread: bool = False) -> "StaticKV | None":
        """KV for these rows, or None where they are too many or too long, or have earlier pictures to read.

        kept: for each row what it begins with, or None.
        num_columns: that the longest row is expected to need.
        """
        width = WIDTH * math.ceil((num_columns + 1) / WIDTH)  # the last column is for padding
        is_too_large = len(kept) > MAX_ROWS or width > MAX_COLUMNS
        if is_too_large or has_unread:
            self.counts["eager_size" if is_too_large else "eager_pictures"] += 1
            return None
        if self._captures and not self._caches:
            self._capture_usual(width)
        return StaticKV(self, self._find_cache(round_rows(len(kept)), width), kept)

    def _capture_usual(self, width: int) -> None:
        for rows in self._usual_rows:
            cache = self._find_cache(rows, width)
            for split, length, has_images in self._list_usual(rows, width):
                self.find_chunk(cache, split, length, has_images).record()

    def _list_usual(self, rows: int, width: int) -> list[tuple[int, int, bool]]:
        """Split, padded length and whether there are images, of the chunks that are captured first."""
        first = {round_up(count, rows) for count in range(1, min(_LONGEST_FIRST, width) + 1)}
        following = {round_up(count, rows) for count in range(1, min(_LONGEST_NEXT, width) + 1)}
        usual = [(0, length, True) for length in first]
        if self.family.is_recurrent:
            usual = [(split, split + round_up(_DRAFT, rows), True) for split in range(BLOCK, width - _DRAFT, BLOCK)]
        return sorted([*usual, *((0, length, False) for length in following)], reverse=True)

    def _find_cache(self, rows: int, width: int) -> StaticCache:
        if (rows, width) not in self._caches:
            self._caches[rows, width] = StaticCache(self.family, rows, width, SLOTS)
        return self._caches[rows, width]

    def clear(self) -> None:
        """Zero what is kept: a number that is not finite would stay in a column that nobody sees and spoil its row."""
        for cache in self._caches.values():
            for each in cache.tensors:
                each.zero_()

    def find_chunk(self, cache: StaticCache, split: int, length: int, has_images: bool) -> ChunkForward:
        """The forward for chunks of this padded length and split, made at its first use."""
        key = cache.rows, cache.width, split, length, has_images
        if key not in self._chunks:
            self._chunks[key] = ChunkForward(self.family, cache, split, length, has_images, self._graphs)
        return self._chunks[key]

    def encode_images(self, prepared: Sequence[PreparedRequest]) -> list[ImageFeatures]:
        """As `Family.encode_images`."""
        if not self.family.can_capture_vision:
            return self.family.encode_images(prepared)
        return encode_by_layout(prepared, self._encode_alike)

    def _encode_alike(self, layout: PictureLayout, prepared: Sequence[PreparedRequest]) -> list[ImageFeatures]:
        if layout not in self._towers and len(self._towers) == MAX_CAPTURED:
            return self.family.encode_images(prepared)
        tower = self._find_tower(layout, round_rows(len(prepared)))
        encoded = tower.run([take_pixels(each, layout) for each in prepared])
        # A copy: the memory of one graph's output may be another's scratch.
        return [
            ImageFeatures(each.tokens.clone(), tuple(level.clone() for level in each.deep))
            for each in encoded[: len(prepared)]
        ]

    def _find_tower(self, layout: PictureLayout, rows: int) -> TowerForward:
        if not self._towers:
            self._towers[layout] = {
                each: TowerForward(self.family, layout, each, self._graphs) for each in self._usual_rows
            }
        towers = self._towers.setdefault(layout, {})
        if rows not in towers:
            towers[rows] = TowerForward(self.family, layout, rows, self._graphs)
        return towers[rows]


class StaticKV:
    """Some rows of a static cache. filled: how many columns are in use. align: as `lay_out` takes it."""

    def __init__(self, forwards: StaticForwards, cache: StaticCache, kept: Sequence[Kept | None]):
        self._forwards = forwards
        self._cache = cache
        self._kept = kept
        self._rows = np.arange(len(kept))
        self.align = BLOCK if cache.states else None
        self.filled = 0
        for row, each in enumerate(kept):
            if each:
                for kv, its in zip(cache.kv, each.kv, strict=True):
                    kv[:, :, row, :, : each.num_columns] = its
                self.filled = max(self.filled, each.num_columns)
        cache.first = 0  # nothing is read yet
        if cache.states:
            cache.states.begin(kept)

    def fits(self, chunk: Chunk) -> bool:
        """Whether there are columns for a chunk, and one behind it for padding that finds no other."""
        filled = self.filled + chunk.token_ids.shape[1]
        first = self._cache.find_first(chunk, self.filled)
        has_slots = filled - first < self._cache.num_slots or not self._cache.states
        return filled < self._cache.width and has_slots

    def run(self, chunk: Chunk, images: Sequence[PlacedImage], picks: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """As `DynamicKV.run`."""
        length = chunk.token_ids.shape[1]
        padded = chunk.split + round_up(length - chunk.split, self._cache.rows)
        forward = self._forwards.find_chunk(self._cache, chunk.split, padded, bool(images))
        places = np.concatenate([row * forward.length + pick for row, pick in zip(self._rows, picks, strict=True)])
        hidden = forward.run(chunk, self._rows, self.filled, images, places)
        self.filled += length
        return list(hidden.split([len(pick) for pick in picks]))

    def copy_columns(self, row: int, columns: np.ndarray) -> Kept:
        """As `DynamicKV.copy_columns`."""
        cache, row = self._cache, int(self._rows[row])
        index = torch.as_tensor(columns, device=self._forwards.family.device)
        kept = Kept(tuple(kv[:, :, row].index_select(3, index) for kv in cache.kv))
        return cache.states.complete(kept, row) if cache.states else kept

    def narrow(self, rows: np.ndarray) -> None:
        """Go on with these rows; the others are padding from now on."""
        self._rows = self._rows[rows]

    def grow(self) -> DynamicKV:
        """The same rows and columns as KV that can take any number more."""
        self._forwards.counts["grown"] += 1
        family, cache = self._forwards.family, self._cache
        if cache.states and not cache.first:
            return RecurrentKV(family, self._kept)
        kept = [Kept(tuple(kv[:, :, row, :, : self.filled] for kv in cache.kv)) for row in self._rows]
        if not cache.states:
            return DynamicKV(family, kept)
        rows = torch.as_tensor(self._rows, device=family.device)
        return RecurrentKV(family, kept, cache.states.select(rows).cut(self.filled - cache.first))
