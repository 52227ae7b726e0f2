"""KV of an episode's prompt text before the image, kept between its steps.

What is kept is a copy of the columns before the first image token, so nothing that an image could
have touched (attention looks back only) is ever in it.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.decoding.forward import LayerKV


@dataclass(frozen=True, eq=False)
class _Entry:
    ids: np.ndarray  # (n,) token ids of the columns
    layers: Sequence[LayerKV]
    num_bytes: int


class PrefixStore:
    """One entry an episode; the least recently used go when all together pass `max_bytes`."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self._entries.values())

    def find(self, episode: str | None, ids: np.ndarray) -> list[LayerKV]:
        """Layers of the columns whose tokens, from the first on, are those of `ids` (n,); [] for none."""
        entry = self._entries.get(episode) if episode is not None else None
        if entry is None:
            return []
        self._entries.move_to_end(episode)
        shorter = min(len(ids), len(entry.ids))
        differs = np.flatnonzero(entry.ids[:shorter] != ids[:shorter])
        count = int(differs[0]) if len(differs) else shorter
        return [(keys[:, :count], values[:, :count]) for keys, values in entry.layers] if count else []

    def keep(self, episode: str, ids: np.ndarray, layers: Sequence[LayerKV]) -> None:
        """layers: of the columns of exactly `ids`, in memory of their own."""
        num_bytes = sum(tensor.nbytes for layer in layers for tensor in layer)
        self._entries.pop(episode, None)
        self._entries[episode] = _Entry(ids, layers, num_bytes)
        while self.num_bytes > self._max_bytes:
            self._entries.popitem(last=False)

    def forget(self, episode: str) -> None:
        self._entries.pop(episode, None)
