"""Movement phrases of Embodied Chain-of-Thought (Zawalski et al., 2024): words, signs and labels.

Knows no model and no metres of a command; the labelling follows ECoT's own code in every quirk, so
that labels are comparable with theirs.
"""

import itertools
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np

from vlm_local.errors import DataError, GrammarError, Report
from vlm_local.types import Episode, Primitive

# Per axis: sign -> word. The first three share one "move" part.
_MOVE_WORDS = (
    {1: "forward", -1: "backward"},
    {1: "left", -1: "right"},
    {1: "up", -1: "down"},
)
_PART_WORDS = (
    {1: "tilt up", -1: "tilt down"},
    {1: "rotate counterclockwise", -1: "rotate clockwise"},
    {1: "open gripper", -1: "close gripper"},
)
STOP = "stop"
_SLIGHTLY = "slightly "  # not ECoT's: before a phrase that moves the arm, for smaller steps

THRESHOLD = 0.03  # m, and rad after ROTATION_DIVISOR, and share of the gripper's range
TRANSITIONS = 3  # a label describes this many control steps
WINDOW = TRANSITIONS + 1  # states in a full window
L1_CLIP_M = 3 * THRESHOLD  # a longer xyz motion (L1 norm) is scaled down to this
ROTATION_DIVISOR = 10


def format_phrase(primitive: Primitive) -> str:
    """Signs -> phrase, e.g. (1, 1, 0, 1, 0, -1) -> "move forward left, tilt up, close gripper"."""
    move = [words[sign] for words, sign in zip(_MOVE_WORDS, primitive[:3], strict=True) if sign]
    parts = ["move " + " ".join(move)] if move else []
    parts += [words[sign] for words, sign in zip(_PART_WORDS, primitive[3:], strict=True) if sign]
    return ", ".join(parts) or STOP


@cache
def _phrase_table() -> dict[str, Primitive]:
    signs = itertools.product((0, 1, -1), repeat=6)
    return {format_phrase(primitive): primitive for primitive in itertools.starmap(Primitive, signs)}


@cache
def _slight_table() -> dict[str, Primitive]:
    return {_SLIGHTLY + phrase: primitive for phrase, primitive in _phrase_table().items() if any(primitive[:5])}


def list_phrases() -> tuple[str, ...]:
    """All 729 phrases of ECoT, which labels are made of."""
    return tuple(_phrase_table())


def list_slight_phrases() -> tuple[str, ...]:
    """The 726 of them that move the arm, with "slightly" before them."""
    return tuple(_slight_table())


def is_slight(phrase: str) -> bool:
    return phrase in _slight_table()


def parse_phrase(phrase: str) -> Primitive:
    """Phrase, with or without "slightly" -> signs. Raises GrammarError for anything else."""
    try:
        return _phrase_table().get(phrase) or _slight_table()[phrase]
    except KeyError:
        raise GrammarError(f"{phrase!r} is not a movement phrase such as 'move forward left, close gripper'") from None


def is_labelable(primitive: Primitive) -> bool:
    """Whether `label_window` can give it, up to rounding: at most two of x, y, z (513 of 729).

    Three values over THRESHOLD cannot have an L1 norm of at most L1_CLIP_M = 3 x THRESHOLD.
    """
    return sum(map(abs, primitive[:3])) < 3


def label_window(states: np.ndarray) -> Primitive:
    """The movement between the first and the last of 2 to WINDOW states.

    states: float (n, 7) [x, y, z (m), roll, pitch, yaw (rad), gripper 0..1]; compared in its own
    dtype (Bridge: float32). ECoT's quirks, kept on purpose: comparisons are strict; a long xyz
    motion is clipped by its L1 norm; yaw is not unwrapped, so crossing pi flips its sign; roll
    and pitch are one word, and roll wins.
    """
    motion = states[-1] - states[0]
    length = np.abs(motion[:3]).sum()
    if length > L1_CLIP_M:
        motion[:3] *= L1_CLIP_M / length
    motion[3:6] /= ROTATION_DIVISOR
    signs = (motion > THRESHOLD).astype(int) - (motion < -THRESHOLD).astype(int)
    x, y, z, roll, pitch, yaw, gripper = signs.tolist()
    return Primitive(x, y, z, roll or pitch, yaw, gripper)


def label_episode(states: np.ndarray) -> tuple[list[Primitive], list[bool]]:
    """Labels of all steps of an episode, and whether each had a full window of WINDOW states.

    states: float (T, 7) as in `label_window`. Windows at the end are shorter, which acts like a
    larger threshold; the last step repeats the label before it. Raises DataError for T < 2.
    """
    if len(states) < 2:
        raise DataError(f"an episode of {len(states)} step(s) has no movement to label; at least 2 are needed")
    starts = range(len(states) - 1)
    labels = [label_window(states[start : start + WINDOW]) for start in starts]
    full = [start + WINDOW <= len(states) for start in starts]
    return [*labels, labels[-1]], [*full, False]


def iterate_labels(episodes: Iterable[Episode], report: Report) -> Iterator[dict[str, Any]]:
    """A row a step: episode, step, phrase, full_window. Episodes without a label go to `report`."""
    for episode in episodes:
        try:
            labels, full_windows = label_episode(episode.states)
        except DataError as error:
            report(DataError(f"{episode.source}: {error}"))
            continue
        for step, (label, full_window) in enumerate(zip(labels, full_windows, strict=True)):
            yield {
                "episode": episode.index,
                "step": step,
                "phrase": format_phrase(label),
                "full_window": full_window,
            }
