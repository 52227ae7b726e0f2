"""Which nodes of a trie are likely to matter before the model was asked: what a draft is made of.

Robots repeat themselves: the next sentence is the last one, or shares most of its tokens, and what the
model thought likely one step ago it mostly still does. A wrong guess costs time only; no decision and no
probability depends on it.
"""

from collections.abc import Sequence

import numpy as np

from vlm_local.decoding.trie import TokenTrie

_DECAY = 0.5  # of the weight of the episode's last sentence, the one before it, ...
_SHORT = 0.3  # weight of "something short", which is all there is to go by in a first step
_MODEL = 3.0  # weight of what the model thought one step ago
_NONE = ""
_LEAST = 1e-200  # keeps ratios finite where a weight underflows


class Prior:
    """Weights of a trie's nodes, made of the sentences said last; computed once for each of those."""

    def __init__(self, trie: TokenTrie):
        self._trie = trie
        self._known = frozenset(trie.sentences)
        self._weights: dict[str, np.ndarray] = {}

    def weigh(self, drafts: Sequence[str], expected: np.ndarray | None = None) -> np.ndarray:
        """drafts: likeliest first; unknown ones are skipped. expected: (N,) probability of each node one
        step ago, as far as it was read; None in a first step. Returns (N,) weights: a node's is the
        sum over the sentences that begin with it, so it never exceeds its parent's.
        """
        total = _SHORT * self._compute(_NONE)
        drafts = [sentence for sentence in drafts if sentence in self._known]
        for rank, sentence in enumerate(drafts):
            total = total + _DECAY**rank * self._compute(sentence)
        if expected is not None:
            total = total + _MODEL * expected
        return np.maximum(total, _LEAST)

    def _compute(self, sentence: str) -> np.ndarray:
        """(N,) weights when `sentence` was said: a sentence loses a factor e for every token that only
        one of the two has.
        """
        if sentence not in self._weights:
            trie = self._trie
            said = self._list_tokens(sentence)
            shared = np.zeros(len(trie))
            for start, end in zip(trie.levels[1:-1], trie.levels[2:], strict=True):
                level = slice(start, end)
                shared[level] = shared[trie.parent[level]] + np.isin(trie.token[level], said)
            shared = shared[trie.end_node]
            other = np.maximum(len(said) - shared, 0)
            alone = np.exp(shared - trie.depth[trie.end_node] - other)  # (S,)
            weights = np.bincount(trie.end_node, alone / alone.sum(), minlength=len(trie))
            for start, end in zip(trie.levels[-2:0:-1], trie.levels[:1:-1], strict=True):
                weights += np.bincount(trie.parent[start:end], weights[start:end], minlength=len(trie))
            self._weights[sentence] = weights
        return self._weights[sentence]

    def _list_tokens(self, sentence: str) -> list[int]:
        if sentence == _NONE:
            return []
        trie = self._trie
        return [int(trie.token[node]) for node in trie.list_path(int(trie.end_node[trie.sentences.index(sentence)]))]


def select_nodes(trie: TokenTrie, weights: np.ndarray, focus: np.ndarray, limit: int) -> np.ndarray:
    """The nodes worth reading next, ascending; every one follows a node of `focus` or is one.

    weights: (N,) of `Prior.weigh`. focus: (N,) probability mass of the nodes that must be read, 0
    elsewhere; none of them or of what follows them has been read. limit: how many nodes at most.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(focus > 0, focus / weights, 0.0)
    for start, end in zip(trie.levels[1:-1], trie.levels[2:], strict=True):
        level = slice(start, end)
        scale[level] = np.where(scale[level] > 0, scale[level], scale[trie.parent[level]])
    score = scale * weights
    candidates = np.flatnonzero(trie.needed & (score > 0))
    if len(candidates) > limit:
        best = np.argsort(-score[candidates], kind="stable")[:limit]  # on a tie the parent comes first
        candidates = np.sort(candidates[best])
    return candidates
