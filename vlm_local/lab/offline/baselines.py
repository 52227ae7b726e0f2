"""What an answer is worth that never looks at the picture.

majority: always the commonest label of the scored steps. repeat-last: the true label of the step
before ("stop" at first), which no robot has. random: every phrase alike. oracle-label: the label.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import derive_seed, draw_phrase
from vlm_local.primitives import STOP

NAMES = ("majority", "repeat-last", "random", "oracle-label")


def derive_episode_seed(seed: int, episode: int) -> int:
    """What every policy is reset with before this episode of an evaluation."""
    return derive_seed(seed, "eval", episode)


def find_majority(labels: Iterable[str]) -> str:
    """The commonest label, the first seen of several; "stop" where there is none."""
    counts = Counter(labels)
    return counts.most_common(1)[0][0] if counts else STOP


def answer_baseline(
    name: str,
    steps: Sequence[tuple[int, int]],
    labels: Sequence[str],
    previous: Sequence[str | None],
    majority: str,
    seed: int,
) -> list[str]:
    """A baseline's phrases.

    steps: (episode, step) of each. previous: label of the step before, None for a first one.
    random draws as a server with `--policy random` does: Philox, inverse CDF, file order.
    """
    match name:
        case "majority":
            return [majority] * len(labels)
        case "repeat-last":
            return [phrase or STOP for phrase in previous]
        case "oracle-label":
            return list(labels)
        case "random":
            phrases = load_phrase_grammar().sentences
            seeds = {episode: derive_episode_seed(seed, episode) for episode in {episode for episode, _ in steps}}
            return [draw_phrase(phrases, seeds[episode], step) for episode, step in steps]
    raise ValueError(f"{name!r} is none of the baselines {NAMES}")
