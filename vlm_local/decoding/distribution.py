"""The distribution of one request over its sentences while the model has read a part of the trie, and the choice of a
sentence from it: each strategy chooses one, or says which nodes must be read first. Before anything is read a prior
says which nodes are likely to matter: what a draft is made of.

A sentence's probability is the product over its tokens and the end token of the softmax restricted to the tokens that
the trie allows there.

Robots repeat themselves: the next sentence is the last one, or shares most of its tokens, and what the model thought
likely one step ago it mostly still does. A wrong guess of the prior costs time only; no decision and no probability
depends on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.decoding.trie import TokenTrie
from vlm_local.errors import EngineError
from vlm_local.types import GenerationRequest

FAST_MISSING = 0.01  # probability that the fast posterior may leave unassigned
_DECAY = 0.5  # of the weight of the episode's last sentence, the one before it, ...
_SHORT = 0.3  # weight of "something short", which is all there is to go by in a first step
_MODEL = 30.0  # weight of what the model thought one step ago; where that is not known, likeness tells
_NONE = ""
_LEAST = 1e-200  # keeps ratios finite where a weight underflows


class TrieDistribution:
    """Log-probabilities of a trie's edges, as far as the model has read its nodes.

    edge_log: float64 (E,), NaN where an edge's node is unread, 0 where only one token may follow.
    read: bool (N,), nodes whose edges are known.
    """

    def __init__(self, trie: TokenTrie, taken_out: np.ndarray | None = None):
        """taken_out: float64 (E,), subtracted from the logits of each edge; None for nothing."""
        self.trie = trie
        self._taken_out = taken_out
        self.read = ~trie.branching
        self.edge_log = np.where(trie.branching[trie.edge_node], np.nan, 0.0)
        self._spread: dict[float, tuple[np.ndarray, np.ndarray]] = {}  # by temperature, until more is read

    def learn(self, nodes: np.ndarray, logits: np.ndarray) -> None:
        """Fill in the edges of `nodes` from the model's logits.

        nodes: int (n,) ids. logits: float (n, V) of the trie's live tokens after each of them. Raises EngineError
        for logits that are not finite.
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
        if self._taken_out is not None:
            values -= self._taken_out[edges]
        self.edge_log[edges] = _log_softmax(values, begin, degree)
        self.read[nodes] = True
        self._spread.clear()

    def spread(self, temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Probability of each node (N,) and of each sentence (S,), with every token's logits divided by `temperature`.

        Exact where every node on the way was read, else 0. Not to be written to.
        """
        if temperature not in self._spread:
            self._spread[temperature] = self._multiply(self._sharpen(temperature))
        return self._spread[temperature]

    def _sharpen(self, temperature: float) -> np.ndarray:
        """(E,) probabilities; 0 where unread."""
        trie = self.trie
        values = self.edge_log
        if temperature != 1.0:
            values = _log_softmax(values / temperature, trie.edges[:-1], np.diff(trie.edges))
        return np.nan_to_num(np.exp(values), nan=0.0)

    def _multiply(self, edge_probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        trie = self.trie
        mass = np.ones(len(trie))
        for level in trie.levels:
            mass[level] = mass[trie.parent[level]] * edge_probability[trie.in_edge[level]]
        return mass, mass[trie.end_node] * edge_probability[trie.end_edge]


@dataclass(frozen=True, eq=False)
class Choice:
    """A strategy's result: a sentence, or what must be read before it can be chosen.

    sentence: index of the chosen sentence, None while undecided. margin: lead over the closest alternative, in
    log-probability. focus: float64 (N,), None once decided; focus[n] is the probability of unread node n that could
    still change the choice.
    """

    sentence: int | None
    margin: float = np.inf
    focus: np.ndarray | None = None


def decide(distribution: TrieDistribution, request: GenerationRequest, slack: float = 0.0) -> Choice:
    """Choose by the request's `decide`. slack: a lead in log-probability that counts as certain."""
    if request.decide == "greedy":
        return decide_greedy(distribution)
    if request.decide == "map":
        return decide_map(distribution, slack)
    assert request.uniform is not None  # every request that samples brings its draw
    return decide_sample(distribution, request.uniform, request.temperature)


def decide_greedy(distribution: TrieDistribution) -> Choice:
    """The most probable token at each node."""
    trie = distribution.trie
    node, margin = 0, np.inf
    while distribution.read[node]:
        edge = int(trie.edges[node])
        if trie.branching[node]:
            values = distribution.edge_log[edge : trie.edges[node + 1]]
            best = int(values.argmax())
            margin = min(margin, float(values[best] - np.delete(values, best).max()))
            edge += best
        node = int(trie.edge_target[edge])
        if node < 0:
            return Choice(-1 - node, margin)
    focus = np.zeros(len(trie))
    focus[node] = 1.0
    return Choice(None, margin, focus)


def decide_map(distribution: TrieDistribution, slack: float = 0.0) -> Choice:
    """The most probable sentence: certain once no unread node holds more mass than it (best-first)."""
    mass, sentences = distribution.spread()
    frontier = np.where(distribution.read, 0.0, mass)
    best = int(sentences.argmax())
    rival = np.delete(sentences, best).max(initial=0.0)
    open_mass = frontier.max()
    if open_mass > sentences[best] * np.exp(-slack) or sentences[best] == 0.0:
        return Choice(None, focus=np.where(frontier >= sentences[best] * np.exp(-slack), frontier, 0.0))
    with np.errstate(divide="ignore"):
        return Choice(best, float(np.log(sentences[best]) - np.log(max(rival, open_mass))))


def decide_sample(distribution: TrieDistribution, uniform: float, temperature: float) -> Choice:
    """Inverse CDF over the sentences in their order; exact bounds on it decide as soon as they can."""
    trie = distribution.trie
    mass, sentences = distribution.spread(temperature)
    frontier = np.where(distribution.read, 0.0, mass)
    count = len(sentences)
    lower = (sentences + np.bincount(trie.last, frontier, minlength=count)).cumsum()  # of the CDF at s
    upper = (sentences + np.bincount(trie.first, frontier, minlength=count)).cumsum()
    latest = int(np.searchsorted(lower / lower[-1], uniform, side="right"))  # both end at exactly 1
    earliest = int(np.searchsorted(upper / upper[-1], uniform, side="right"))
    if earliest == latest and sentences[latest] > 0:
        return Choice(latest)
    open_here = (trie.first <= latest) & (trie.last >= earliest)
    return Choice(None, focus=np.where(open_here, frontier, 0.0))


def certify(distribution: TrieDistribution, posterior: str) -> np.ndarray | None:
    """Probability (N,) of the unread nodes that a "fast" or "exact" posterior still needs, None when it needs none."""
    mass, _ = distribution.spread()
    frontier = np.where(distribution.read, 0.0, mass)
    allowed = FAST_MISSING if posterior == "fast" else 0.0
    return frontier if frontier.sum() > allowed else None


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
            for level in trie.levels:
                shared[level] = shared[trie.parent[level]] + np.isin(trie.token[level], said)
            shared = shared[trie.end_node]
            other = np.maximum(len(said) - shared, 0)
            alone = np.exp(shared - trie.depth[trie.end_node] - other)  # (S,)
            weights = np.bincount(trie.end_node, alone / alone.sum(), minlength=len(trie))
            for level in reversed(trie.levels):
                weights += np.bincount(trie.parent[level], weights[level], minlength=len(trie))
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
    for level in trie.levels:
        scale[level] = np.where(scale[level] > 0, scale[level], scale[trie.parent[level]])
    score = scale * weights
    candidates = np.flatnonzero(trie.needed & (score > 0))
    if len(candidates) > limit:
        best = np.argsort(-score[candidates], kind="stable")[:limit]  # on a tie the parent comes first
        candidates = np.sort(candidates[best])
    return candidates
