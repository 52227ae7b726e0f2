"""KV of an episode's prompt text before the image, kept between its steps.

What is kept is a copy of the columns before the first image token, so nothing that an image could
have touched (attention looks back only) is ever in it.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class _Entry:
    ids: np.ndarray  # (n,) token ids of the columns
    kv: torch.Tensor  # (layers, 2, heads, n, head_dim)


class PrefixStore:
    """One entry an episode; the least recently used go when all together pass `max_bytes`."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(entry.kv.nbytes for entry in self._entries.values())

    def find(self, episode: str | None, ids: np.ndarray) -> torch.Tensor | None:
        """KV (layers, 2, heads, m, head_dim) of the columns whose tokens, from the first on, are those of
        `ids` (n,); None where there is none.
        """
        entry = self._entries.get(episode) if episode is not None else None
        if entry is None:
            return None
        self._entries.move_to_end(episode)
        shorter = min(len(ids), len(entry.ids))
        differs = np.flatnonzero(entry.ids[:shorter] != ids[:shorter])
        count = int(differs[0]) if len(differs) else shorter
        return entry.kv[:, :, :, :count] if count else None

    def keep(self, episode: str, ids: np.ndarray, kv: torch.Tensor) -> None:
        """kv: of the columns of exactly `ids`, (layers, 2, heads, n, head_dim) in memory of its own."""
        self._entries.pop(episode, None)
        self._entries[episode] = _Entry(ids, kv)
        while self.num_bytes > self._max_bytes:
            self._entries.popitem(last=False)

    def forget(self, episode: str) -> None:
        self._entries.pop(episode, None)
