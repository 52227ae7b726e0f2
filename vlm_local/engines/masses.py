"""Log-probabilities of the tokens of one answer -> what they say of every sentence. Pure numpy.

A server reports, at each token it said, the likeliest tokens it could have said there. Each of them
leads to the sentences that begin with the text so far and that token, so a token's probability is
the mass of that set. A set of one sentence is a probability; the others stay sets until a narrower
question splits them.
"""

import functools
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np


class Token(NamedTuple):
    """text: the token's bytes. logprob: natural logarithm, at most 0, after the server's constraint; -inf for never."""

    text: bytes
    logprob: float


@dataclass(frozen=True)
class Position:
    """A token of an answer, and the likeliest tokens at its place, itself included.

    is_complete: whether every token with a chance is listed, the end token perhaps excepted.
    """

    said: Token
    top: tuple[Token, ...]
    is_complete: bool = True


class Mass(NamedTuple):
    """Probability of a set of sentences: `Spelling.order[first:last]`."""

    first: int
    last: int
    probability: float


@dataclass(frozen=True, eq=False)
class Spelling:
    """Sentences in the order of their spelt bytes, so that those with a common beginning are neighbours.

    texts: sorted. order: int (S,), the index of each of them in the request's order.
    """

    texts: tuple[bytes, ...]
    order: np.ndarray

    def find(self, prefix: bytes, first: int, last: int) -> tuple[int, int]:
        """The range within first..last whose texts begin with `prefix`."""
        begin = itemgetter(slice(len(prefix)))
        low = bisect_left(self.texts, prefix, first, last, key=begin)
        return low, bisect_right(self.texts, prefix, low, last, key=begin)


@functools.lru_cache(maxsize=256)
def build_spelling(spelt: tuple[str, ...]) -> Spelling:
    """spelt: the whole text of each sentence, in the request's order."""
    texts = [text.encode() for text in spelt]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    return Spelling(tuple(texts[index] for index in order), np.array(order))


def weigh(spelling: Spelling, said: bytes, positions: Sequence[Position], temperature: float = 1.0) -> list[Mass]:
    """Masses of disjoint events; their sum misses what the server did not list. The last is that of what was said.

    said: the spelt answer; the list is empty where the positions do not spell it. temperature:
        divides the logarithms of every position's listed tokens, which are normalised again unless
        it is 1.
    """
    masses: list[Mass] = []
    path, reach, first, last = b"", 1.0, 0, len(spelling.texts)
    for position in positions:
        if _lead(spelling, path, position.said, first, last) is None:
            return []
        if last - first > 1:  # all that may follow a set of one sentence is that sentence
            branches = _list_branches(spelling, path, position, first, last)
            shares = _soften([branch.logprob for branch in branches], temperature)
            follows, share = (first, last), 0.0
            for branch, weight in zip(branches, shares, strict=True):
                if branch.is_said:
                    follows, share = branch.lead, weight
                else:
                    masses.append(Mass(*branch.lead, reach * weight))
            if not share > 0:  # what was said cannot have been impossible
                return []
            (first, last), reach = follows, reach * share
        if path == said:  # the token after the whole sentence was its end
            break
        path += position.said.text
    return [*masses, Mass(first, last, reach)] if path == said else []


class _Branch(NamedTuple):
    """A way on from a position. lead: the sentences that it leads to."""

    lead: tuple[int, int]
    logprob: float
    is_said: bool


def _list_branches(spelling: Spelling, path: bytes, position: Position, first: int, last: int) -> list[_Branch]:
    """The listed tokens that lead to one of several sentences.

    Some servers leave the end token out of their lists, or give it no probability. Where a sentence
    can end, what is missing is the end's; in a list that was cut short it stays a set's.
    """
    branches = [
        _Branch(lead, token.logprob, token == position.said)
        for token in position.top
        if (lead := _lead(spelling, path, token, first, last))
    ]
    end = (first, first + 1)
    told = [branch for branch in branches if math.exp(branch.logprob) > 0]
    if spelling.texts[first] != path or any(branch.lead == end for branch in told):
        return branches
    rest = max(0.0, 1.0 - sum(math.exp(branch.logprob) for branch in told))
    says_end = any(branch.lead == end and branch.is_said for branch in branches)
    lead = end if position.is_complete else (first, last)
    others = [branch for branch in branches if branch.lead != end]
    return [*others, _Branch(lead, math.log(rest) if rest else -math.inf, says_end)]


def is_constrained(spelling: Spelling, positions: Sequence[Position]) -> bool:
    """Whether the log-probabilities of an only sentence's tokens were taken after the constraint.

    Then nothing else had a chance anywhere, and the tokens that spell it add up to one.
    """
    path = b""
    for position in positions:
        leads = [t.logprob for t in position.top if _lead(spelling, path, t, 0, 1)]
        if np.exp(leads).sum() < 0.99:
            return False
        path += position.said.text
        if path == spelling.texts[0]:
            return True
    return False


def tells_end(text: bytes, positions: Sequence[Position]) -> bool:
    """Whether a position follows the tokens that spell `text`: that of the end token."""
    return text in itertools.accumulate(position.said.text for position in positions[:-1])


def _lead(spelling: Spelling, path: bytes, token: Token, first: int, last: int) -> tuple[int, int] | None:
    """The sentences that a token leads to; the one that it ends; None for a token of neither kind."""
    low, high = spelling.find(path + token.text, first, last) if token.text else (0, 0)
    if low < high:
        return low, high
    return (first, first + 1) if spelling.texts[first] == path else None


def _soften(logprobs: Sequence[float], temperature: float) -> np.ndarray:
    weights = np.exp(np.array(logprobs, dtype=np.float64) / temperature)
    return weights if temperature == 1.0 else weights / max(weights.sum(), 1e-300)


def list_probabilities(spelling: Spelling, masses: Sequence[Mass]) -> np.ndarray:
    """float64 (S,) in the request's order: lower bounds, from the sets of one sentence."""
    probabilities = np.zeros(len(spelling.texts))
    for first, last, probability in masses:
        if last - first == 1:
            probabilities[spelling.order[first]] += probability
    return probabilities


def locate(spelling: Spelling, masses: Sequence[Mass], uniform: float) -> int | Mass:
    """Where the CDF over the sentences, in the request's order, passes `uniform`.

    The index of the sentence when the masses settle it, else the heaviest set to be split first.
    The CDF is that of the listed masses, scaled to end at 1.
    """
    size = len(spelling.texts)
    at_last, at_first = np.zeros(size), np.zeros(size)
    spans = []
    for first, last, probability in masses:
        members = spelling.order[first:last]
        spans.append((int(members.min()), int(members.max())))
        at_first[spans[-1][0]] += probability
        at_last[spans[-1][1]] += probability
    lower, upper = at_last.cumsum(), at_first.cumsum()  # bounds of the CDF, at every sentence
    target = uniform * lower[-1]
    earliest = min(int(np.searchsorted(upper, target, side="right")), size - 1)
    latest = min(int(np.searchsorted(lower, target, side="right")), size - 1)
    unsettled = [
        mass
        for mass, (start, stop) in zip(masses, spans, strict=True)
        if mass.last - mass.first > 1 and start <= latest and stop >= earliest
    ]
    if earliest == latest or not unsettled:
        return earliest
    return max(unsettled, key=lambda mass: mass.probability)


def find_likeliest(spelling: Spelling, masses: Sequence[Mass]) -> int | Mass:
    """The index of the most probable sentence when the masses settle it, else the heaviest set."""
    probabilities = list_probabilities(spelling, masses)
    best = int(probabilities.argmax())
    sets = [mass for mass in masses if mass.last - mass.first > 1]
    heaviest = max(sets, key=lambda mass: mass.probability, default=None)
    return best if heaviest is None or heaviest.probability <= probabilities[best] else heaviest


def split(masses: Sequence[Mass], parent: Mass, children: Sequence[Mass]) -> list[Mass]:
    """Replace `parent` by the answer to a question about its sentences alone.

    children: as `weigh` gives them. A child as wide as its parent is another spelling of the same
    beginning; it is taken to go on like the one that was said, or no question would ever narrow it.
    Returns [] where what was said is as wide itself: the server does not tell where an answer ends.
    """
    width = parent.last - parent.first
    narrower = [child for child in children if child.last - child.first < width]
    whole = sum(child.probability for child in narrower)
    if not children or children[-1].last - children[-1].first == width or not whole > 0:
        return []
    scale = parent.probability / whole
    rest = [mass for mass in masses if mass is not parent]
    return rest + [Mass(parent.first + first, parent.first + last, scale * p) for first, last, p in narrower]
