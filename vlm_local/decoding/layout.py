"""Which column of the KV cache holds which token, and who may see whom. numpy only.

Rows are requests. A row's columns: what was kept of an earlier step, the rest of the prompt, then
nodes of its trie in the order they were read; padding in between is seen by nobody.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.decoding.trie import TokenTrie


@dataclass(frozen=True, eq=False)
class Chunk:
    """The new tokens of one forward: B rows of T, padded; K columns of KV, these tokens last.

    token_ids: int64 (B, T). positions: int64 (axes, B, T). num_prompt: int (B,), how many of a row's tokens are of
        its prompt. noted: int (B,), behind how many of these a state is to be noted, 0 for none. split: column where
        the nodes of all rows begin; 0 where each row's follow its own prompt.
    visible: bool (B, T, K), who sees whom. near: the same within the sliding window, or None.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    num_prompt: np.ndarray
    noted: np.ndarray
    split: int
    visible: np.ndarray
    near: np.ndarray | None


class Row:
    """One request's tokens in the cache."""

    def __init__(
        self,
        trie: TokenTrie,
        prompt_ids: np.ndarray,
        positions: np.ndarray,
        behind: int,
        blocks: np.ndarray,
        kept: int,
        keep: int,
        cuts_blocks: bool = False,
    ):
        """prompt_ids: (L,). positions: (axes, L). behind: position of the token after the prompt.
        blocks: int (L,), and cuts_blocks: as `see_prompt` takes them. kept: how many leading tokens are in the first
            columns already; fewer than L. keep: how many are to be kept of this prompt.
        """
        self.trie = trie
        self.prompt_ids, self.positions, self.behind = prompt_ids, positions, behind
        self.blocks, self.kept, self.keep, self.cuts_blocks = blocks, kept, keep, cuts_blocks
        self.columns = np.full(len(trie), -1)  # of each node; the root's is the prompt's last token
        self.prompt_columns = np.arange(kept)
        self.rank = np.arange(kept)  # by column: how many tokens of its own path stand before it

    def list_missing(self, nodes: np.ndarray) -> np.ndarray:
        """Nodes, ascending, that must be fed so that `nodes` can be read: they and what leads to them."""
        wanted = np.unique(self.trie.paths[nodes])
        wanted = wanted[wanted > 0]
        return wanted[self.columns[wanted] < 0]


def see_prompt(
    blocks: np.ndarray, start: int, stop: int, window: int | None = None, cuts_blocks: bool = False
) -> np.ndarray:
    """bool (stop - start, stop): whom the tokens from `start` on see of a prompt's first `stop`.

    Each sees itself and what is before it, within the sliding window if there is one, and all of its own block.
    blocks: int (at least `stop`,), the same number for the tokens of a block, -1 for tokens of none. cuts_blocks: what
        comes later in the own block is seen with a window only, and nothing that it leaves out.
    """
    own, place = blocks[start:stop, None], np.arange(start, stop)[:, None]
    distance = place - np.arange(stop)
    is_near = distance < (stop if window is None else window)
    is_joined = (own == blocks[:stop]) & (own >= 0)
    if cuts_blocks:
        is_joined &= is_near & (window is not None)
    return (distance >= 0) & is_near | is_joined


def lay_out(
    rows: Sequence[Row], nodes: Sequence[np.ndarray], filled: int, window: int | None, align: int | None = None
) -> Chunk:
    """Give columns from `filled` on to what is missing of each row's prompt, then to its nodes.

    nodes: for each row, ids as `list_missing` returns them. align: all rows' nodes begin at the same multiple of this;
        None: each row's behind its own prompt.
    """
    pending = [len(row.prompt_ids) - len(row.prompt_columns) for row in rows]
    split = align * math.ceil(max(pending) / align) if align else 0
    begins = [split if align else count for count in pending]
    length = max(begin + len(new) for begin, new in zip(begins, nodes, strict=True))
    shape = (len(rows), length)
    token_ids = np.zeros(shape, dtype=np.int64)
    positions = np.zeros((rows[0].positions.shape[0], *shape), dtype=np.int64)
    visible = np.zeros((*shape, filled + length), dtype=bool)
    near = None if window is None else np.zeros_like(visible)
    for index, (row, new) in enumerate(zip(rows, nodes, strict=True)):
        row.rank = np.pad(row.rank, (0, filled + length - len(row.rank)))
        if pending[index]:
            _lay_prompt(row, filled, token_ids[index], positions[:, index], visible[index])
        here = slice(begins[index], begins[index] + len(new))
        _lay_nodes(row, new, filled, here, token_ids[index], positions[:, index], visible[index])
        if near is not None and window is not None:
            distance = row.rank[filled:, None] - row.rank[None]
            near[index] = visible[index] & (distance < window)
            if pending[index]:
                near[index][: pending[index], row.prompt_columns] = see_prompt(
                    row.blocks, row.kept, len(row.prompt_ids), window, row.cuts_blocks
                )
    noted = [max(row.keep - row.kept, 0) if count else 0 for row, count in zip(rows, pending, strict=True)]
    return Chunk(token_ids, positions, np.array(pending), np.array(noted), split, visible, near)


def _lay_prompt(row: Row, filled: int, token_ids, positions, visible) -> None:
    count = len(row.prompt_ids) - row.kept
    columns = filled + np.arange(count)
    token_ids[:count] = row.prompt_ids[row.kept :]
    positions[:, :count] = row.positions[:, row.kept :]
    row.prompt_columns = np.concatenate([row.prompt_columns, columns])
    visible[:count, row.prompt_columns] = see_prompt(
        row.blocks, row.kept, len(row.prompt_ids), cuts_blocks=row.cuts_blocks
    )
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
