"""Scenes as data: three blocks around the gripper, one of them named. A seed fixes a scene everywhere."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_local.sim.block_tasks import COLOURS, Reach
from vlm_local.sim.levels import Level

_NUM_BLOCKS = 3
_USUAL_COLOURS = 3
_AREA = np.array([[0.20, -0.20], [0.42, 0.20]])  # where the third block and distractors lie, m
_APART_M = 0.07

Place = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn and asked. Lengths in m, base frame.

    tips: of the open gripper. blocks: colour name and place of each; the first is named unless a change
    says otherwise. words: with a place for `named`, a colour. surroundings: seed of table, light, camera
    and tins; the others are seeds of what a change draws anew, None for as it is.
    """

    tips: tuple[float, float, float]
    blocks: tuple[tuple[str, Place], ...]
    spare: tuple[Place, ...]
    words: str
    named: str
    surroundings: int
    camera: int | None = None
    light: int | None = None
    table: int | None = None
    arm: int | None = None
    distractors: tuple[Place, ...] = ()

    @property
    def instruction(self) -> str:
        return self.words.format(colour=self.named)


def sample_scene(level: Level, seed: int, index: int) -> Scene:
    """Scene `index` of the set with this seed.

    The named block and the second one lie on opposite sides of the gripper in x and in y, so that
    another target is another direction on both; what is mirrored at the gripper stays on the table.
    """
    rng = np.random.default_rng([seed, index])
    tips = np.array([0.31, 0.0, 0.125]) + rng.uniform(-1, 1, 3) * (0.02, 0.03, 0.015)
    sides = rng.choice([-1, 1], 2)
    first = tips[:2] + sides * rng.uniform((0.05, 0.06), (0.09, 0.12))
    second = tips[:2] - sides * rng.uniform((0.05, 0.06), (0.09, 0.12))
    taken = [first, second, *(_flip(first, axis, tips) for axis in (0, 1))]
    spare: list[np.ndarray] = []
    while len(spare) < 3:  # the third block, and two places for distractors
        place = rng.uniform(*_AREA)
        if min(np.linalg.norm(place - other) for other in (*taken, *spare, tips[:2])) > _APART_M:
            spare.append(place)
    names = list(COLOURS)[: None if level.more_colours else _USUAL_COLOURS]
    colours = [str(name) for name in rng.permutation(names)[:_NUM_BLOCKS]]
    words = list_words(level)
    return Scene(
        tips=_round(tips),
        blocks=tuple(zip(colours, map(_round, (first, second, spare[0])), strict=True)),
        spare=tuple(map(_round, spare[1:])),
        words=words[rng.integers(len(words))],
        named=colours[0],
        surroundings=int(rng.integers(2**32)),
    )


def list_words(level: Level) -> tuple[str, ...]:
    """The wordings of a level; "first" has one, and its re-wordings are those seen in training."""
    return {"first": Reach.words[:1], "seen": Reach.words, "unseen": Reach.unseen}[level.wording]


def _flip(place: np.ndarray, axis: int, tips: np.ndarray) -> np.ndarray:
    return np.where(np.arange(2) == axis, 2 * tips[:2] - place, place)


def _round(place) -> Any:  # a tuple of as many floats
    """To micrometres, so that a scene's text and its hash are the same on every processor."""
    return tuple(round(float(value), 6) for value in place)
