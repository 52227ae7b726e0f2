"""Which column of the KV cache holds which token, and who may see whom. numpy only.

Rows are requests. A row's columns: what was kept of an earlier step, the rest of the prompt, then
nodes of its trie in the order they were read; padding in between is seen by nobody.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.decoding.trie import TokenTrie


@dataclass(frozen=True, eq=False)
class Chunk:
    """The new tokens of one forward: B rows of T, padded; K columns of KV, these tokens last.

    token_ids: int64 (B, T). positions: int64 (axes, B, T).
    visible: bool (B, T, K), who sees whom. near: the same within the sliding window, or None.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    visible: np.ndarray
    near: np.ndarray | None


class Row:
    """One request's tokens in the cache."""

    def __init__(self, trie: TokenTrie, prompt_ids: np.ndarray, positions: np.ndarray, behind: int, kept: int):
        """prompt_ids: (L,). positions: (axes, L). behind: position of the token after the prompt.
        kept: how many leading tokens are in the first columns already; fewer than L.
        """
        self.trie = trie
        self.prompt_ids, self.positions, self.behind, self.kept = prompt_ids, positions, behind, kept
        self.columns = np.full(len(trie), -1)  # of each node; the root's is the prompt's last token
        self.prompt_columns = np.arange(kept)
        self.rank = np.arange(kept)  # by column: how many tokens of its own path stand before it

    def list_missing(self, nodes: np.ndarray) -> np.ndarray:
        """Nodes, ascending, that must be fed so that `nodes` can be read: they and what leads to them."""
        wanted = np.unique(self.trie.paths[nodes])
        wanted = wanted[wanted > 0]
        return wanted[self.columns[wanted] < 0]


def lay_out(
    rows: Sequence[Row], nodes: Sequence[np.ndarray], filled: int, is_bidirectional: bool, window: int | None
) -> Chunk:
    """Give columns from `filled` on to what is missing of each row's prompt, then to its nodes.

    nodes: for each row, ids as `list_missing` returns them.
    """
    pending = [len(row.prompt_ids) - len(row.prompt_columns) for row in rows]
    length = max(count + len(new) for count, new in zip(pending, nodes, strict=True))
    shape = (len(rows), length)
    token_ids = np.zeros(shape, dtype=np.int64)
    positions = np.zeros((rows[0].positions.shape[0], *shape), dtype=np.int64)
    visible = np.zeros((*shape, filled + length), dtype=bool)
    near = None if window is None else np.zeros_like(visible)
    for index, (row, new) in enumerate(zip(rows, nodes, strict=True)):
        row.rank = np.pad(row.rank, (0, filled + length - len(row.rank)))
        if pending[index]:
            _lay_prompt(row, filled, token_ids[index], positions[:, index], visible[index], is_bidirectional)
        here = slice(pending[index], pending[index] + len(new))
        _lay_nodes(row, new, filled, here, token_ids[index], positions[:, index], visible[index])
        if near is not None and window is not None:
            distance = row.rank[filled:, None] - row.rank[None]
            near[index] = visible[index] & (distance < window)
            if is_bidirectional:  # a block ignores the window
                near[index, : pending[index]] = visible[index, : pending[index]]
    return Chunk(token_ids, positions, visible, near)


def _lay_prompt(row: Row, filled: int, token_ids, positions, visible, is_bidirectional: bool) -> None:
    count = len(row.prompt_ids) - row.kept
    columns = filled + np.arange(count)
    token_ids[:count] = row.prompt_ids[row.kept :]
    positions[:, :count] = row.positions[:, row.kept :]
    visible[:count, : row.kept] = True
    visible[:count, columns] = True if is_bidirectional else np.tri(count, dtype=bool)
    row.prompt_columns = np.concatenate([row.prompt_columns, columns])
    row.rank[columns] = row.kept + np.arange(count)
    row.columns[0] = columns[-1]


def _lay_nodes(row: Row, nodes: np.ndarray, filled: int, here: slice, token_ids, positions, visible) -> None:
    depth = row.trie.depth[nodes]
    row.columns[nodes] = filled + np.arange(here.start, here.stop)
    token_ids[here] = row.trie.token[nodes]
    positions[:, here] = row.behind + depth - 1
    visible[here, row.prompt_columns] = True
    ancestors = row.columns[row.trie.paths[nodes]]  # (n, D), themselves included
    visible[np.arange(here.start, here.stop)[:, None], ancestors] = True
    row.rank[row.columns[nodes]] = len(row.prompt_ids) - 1 + depth
