"""How a sentence is decided from what is known so far: each says it, or what must be read for it."""

from dataclasses import dataclass

import numpy as np

from vlm_local.decoding.belief import Belief
from vlm_local.types import GenerationRequest

FAST_MISSING = 0.01  # what the fast posterior may leave unassigned


@dataclass(frozen=True, eq=False)
class Verdict:
    """sentence: its index, or None while undecided; then `focus` is the mass (N,) of the unread nodes
    it hangs on. margin: by how much, in log-probability, the closest choice was won.
    """

    sentence: int | None
    margin: float = np.inf
    focus: np.ndarray | None = None


def decide(belief: Belief, request: GenerationRequest, slack: float = 0.0) -> Verdict:
    """Follow the request's `decide`. slack: a lead in log-probability that counts as certain."""
    if request.decide == "greedy":
        return decide_greedy(belief)
    if request.decide == "map":
        return decide_map(belief, slack)
    return decide_sample(belief, request.uniform, request.temperature)


def decide_greedy(belief: Belief) -> Verdict:
    """The most probable token at each node."""
    trie = belief.trie
    node, margin = 0, np.inf
    while belief.read[node]:
        edge = int(trie.edges[node])
        if trie.branching[node]:
            values = belief.edge_log[edge : trie.edges[node + 1]]
            best = int(values.argmax())
            margin = min(margin, float(values[best] - np.delete(values, best).max()))
            edge += best
        node = int(trie.edge_target[edge])
        if node < 0:
            return Verdict(-1 - node, margin)
    focus = np.zeros(len(trie))
    focus[node] = 1.0
    return Verdict(None, margin, focus)


def decide_map(belief: Belief, slack: float = 0.0) -> Verdict:
    """The most probable sentence: certain once no unread node holds more mass than it (best-first)."""
    mass, sentences = belief.spread(belief.sharpen(1.0))
    frontier = np.where(belief.read, 0.0, mass)
    best = int(sentences.argmax())
    rival = np.delete(sentences, best).max(initial=0.0)
    open_mass = frontier.max()
    if open_mass > sentences[best] * np.exp(-slack) or sentences[best] == 0.0:
        return Verdict(None, focus=np.where(frontier >= sentences[best] * np.exp(-slack), frontier, 0.0))
    with np.errstate(divide="ignore"):
        return Verdict(best, float(np.log(sentences[best]) - np.log(max(rival, open_mass))))


def decide_sample(belief: Belief, uniform: float, temperature: float) -> Verdict:
    """Inverse CDF over the sentences in their order; exact bounds on it decide as soon as they can."""
    trie = belief.trie
    mass, sentences = belief.spread(belief.sharpen(temperature))
    frontier = np.where(belief.read, 0.0, mass)
    count = len(sentences)
    lower = (sentences + np.bincount(trie.last, frontier, minlength=count)).cumsum()  # of the CDF at s
    upper = (sentences + np.bincount(trie.first, frontier, minlength=count)).cumsum()
    latest = int(np.searchsorted(lower / lower[-1], uniform, side="right"))  # both end at exactly 1
    earliest = int(np.searchsorted(upper / upper[-1], uniform, side="right"))
    if earliest == latest and sentences[latest] > 0:
        return Verdict(latest)
    open_here = (trie.first <= latest) & (trie.last >= earliest)
    return Verdict(None, focus=np.where(open_here, frontier, 0.0))


def certify(belief: Belief, posterior: str) -> np.ndarray | None:
    """Mass (N,) of unread nodes that "fast" or "exact" still wants read; None when it is content."""
    mass, _ = belief.spread(belief.sharpen(1.0))
    frontier = np.where(belief.read, 0.0, mass)
    allowed = FAST_MISSING if posterior == "fast" else 0.0
    return frontier if frontier.sum() > allowed else None
