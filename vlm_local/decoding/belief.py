"""What is known of one request's distribution over a trie, while the model has read a part of it.

A sentence's probability is the product over its tokens and the end token of the softmax restricted
to the tokens that the trie allows there.
"""

import numpy as np

from vlm_local.decoding.trie import TokenTrie
from vlm_local.errors import EngineError


class Belief:
    """Log-probabilities of edges: of the nodes read so far, and 0 where only one token may follow.

    edge_log: float64 (E,), NaN where a node is unread. read: bool (N,).
    """

    def __init__(self, trie: TokenTrie):
        self.trie = trie
        self.read = ~trie.branching
        self.edge_log = np.where(trie.branching[trie.edge_node], np.nan, 0.0)

    def learn(self, nodes: np.ndarray, logits: np.ndarray) -> None:
        """nodes: (n,) ids. logits: (n, V) of the trie's live tokens behind each of them.

        Raises EngineError for logits that are not finite.
        """
        trie = self.trie
        rows = np.flatnonzero(trie.branching[nodes])
        if len(rows) == 0:
            return
        nodes = nodes[rows]
        degree = trie.edges[nodes + 1] - trie.edges[nodes]
        begin = np.concatenate([[0], np.cumsum(degree)[:-1]])
        edges = np.repeat(trie.edges[nodes] - begin, degree) + np.arange(degree.sum())
        values = logits[np.repeat(rows, degree), trie.edge_token[edges]].astype(np.float64)
        refuse_not_finite(values)
        self.edge_log[edges] = _log_softmax(values, begin, degree)
        self.read[nodes] = True

    def sharpen(self, temperature: float) -> np.ndarray:
        """(E,) probabilities with every token's logits divided by `temperature`; 0 where unread."""
        trie = self.trie
        values = self.edge_log
        if temperature != 1.0:
            values = _log_softmax(values / temperature, trie.edges[:-1], np.diff(trie.edges))
        return np.nan_to_num(np.exp(values), nan=0.0)

    def spread(self, edge_probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E,) -> node mass (N,) and sentence mass (S,): exact where all on the way was read, else 0."""
        trie = self.trie
        mass = np.ones(len(trie))
        for start, end in zip(trie.levels[1:-1], trie.levels[2:], strict=True):
            level = slice(start, end)
            mass[level] = mass[trie.parent[level]] * edge_probability[trie.in_edge[level]]
        return mass, mass[trie.end_node] * edge_probability[trie.end_edge]


def refuse_not_finite(values: np.ndarray) -> None:
    """Raises EngineError where the model's numbers are NaN or infinite: their argmax would be an answer."""
    bad = np.count_nonzero(~np.isfinite(values))
    if bad:
        raise EngineError(
            f"the model's numbers are not finite ({bad} of {values.size}): they leave the range of its dtype, or its "
            f"weights are damaged; try --dtype bfloat16 or float32"
        )


def _log_softmax(values: np.ndarray, begin: np.ndarray, degree: np.ndarray) -> np.ndarray:
    """Log-softmax of each group values[begin[i]:begin[i] + degree[i]]."""
    shifted = values - np.repeat(np.maximum.reduceat(values, begin), degree)
    total = np.add.reduceat(np.exp(shifted), begin)
    return shifted - np.repeat(np.log(total), degree)
