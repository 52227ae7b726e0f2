"""What is left of a phrase where the vocabulary is smaller."""

from collections.abc import Iterable
from functools import cache
from itertools import combinations

from vlm_local.grammar import load_phrase_grammar
from vlm_local.primitives import list_phrases, parse_phrase
from vlm_local.types import Primitive


@cache
def build_projection(grammar: str) -> dict[Primitive, Primitive]:
    """Each of the 729 movements -> the one that is said instead of it, for a shipped grammar.

    Parts that the vocabulary cannot say are dropped, never changed: of the grammar's phrases that say
    nothing else than the movement does, the one that says most of it. Where that leaves a choice (which of
    x, y, z waits when only two fit in a phrase) the axes that come first in types.AXES are said, so z
    waits. The oracle is a function of the state, so what was dropped is asked for again at the next step.
    """
    said = {parse_phrase(sentence) for sentence in load_phrase_grammar(grammar).sentences}
    return {whole: next(part for part in _list_parts(whole) if part in said)
            for whole in map(parse_phrase, list_phrases())}  # fmt: skip


def _list_parts(primitive: Primitive) -> Iterable[Primitive]:
    """All that is left when axes are dropped: the fewest dropped first, then the last axes first."""
    moving = [column for column, sign in enumerate(primitive) if sign]
    for num_kept in range(len(moving), -1, -1):
        for kept in combinations(moving, num_kept):
            yield Primitive(*(sign if column in kept else 0 for column, sign in enumerate(primitive)))
