"""Scenes as data, the changes made to them, and what the right answer then does.

A scene has three blocks around the gripper, one of them named. A seed fixes it on every machine.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from vlm_local.sim.block_tasks import COLOURS, Reach, draw_colours
from vlm_local.sim.levels import Level

# After a change, the right answer has the opposite sign on an axis, stays, or no longer exists (confidence must go).
TURNS, KEEPS, EMPTIES = "turns", "keeps", "empties"

_AREA = np.array([[0.20, -0.20], [0.42, 0.20]])  # where the third block and distractors lie, m
_APART_M = 0.07
_LOW_M = 0.018  # beside a block and below its top
_NEGATED = "do not go to the {colour} block, stay where you are"

Place = tuple[float, float]


@dataclass(frozen=True)
class Scene:
    """Everything that is drawn and asked. Lengths in m, robot base frame.

    tips: (x, y, z) of the open gripper's tips. blocks: colour name and (x, y) of each; the first is the named one
    unless a change says otherwise. spare: places for distractors. words: the instruction, with {colour} for `named`.
    surroundings: seed of table, light, camera and tins. camera, light, table, arm: seeds of what a change draws
    again, None to leave it.
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


@lru_cache(maxsize=1)  # the changes of a scene are shown one after another
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
    colours = draw_colours(level, rng)
    words = Reach.list_words(level)
    return Scene(
        tips=_round(tips),
        blocks=tuple(zip(colours, map(_round, (first, second, spare[0])), strict=True)),
        spare=tuple(map(_round, spare[1:])),
        words=words[rng.integers(len(words))],
        named=colours[0],
        surroundings=int(rng.integers(2**32)),
    )


def _flip(place: np.ndarray, axis: int, tips: np.ndarray) -> np.ndarray:
    return np.where(np.arange(2) == axis, 2 * tips[:2] - place, place)


def _round(place) -> Any:  # a tuple of as many floats
    """To micrometres, so that a scene's text and its hash are the same on every processor."""
    return tuple(round(float(value), 6) for value in place)


@dataclass(frozen=True)
class Change:
    """rule: TURNS, KEEPS or EMPTIES. image: "same" as drawn, "blank", or "other" (of a drawer)."""

    name: str
    rule: str
    title: str
    apply: Callable[[Scene], Scene]
    image: str = "same"


def _mirror(scene: Scene) -> Scene:
    """Left and right exchanged about the arm's own plane; the camera stays."""
    x, y, z = scene.tips
    blocks = tuple((colour, (bx, -by)) for colour, (bx, by) in scene.blocks)
    return replace(scene, tips=(x, -y, z), blocks=blocks, spare=tuple((sx, -sy) for sx, sy in scene.spare))


def _move_past(axis: int) -> Callable[[Scene], Scene]:
    """The named block to the other side of the gripper along one axis."""

    def apply(scene: Scene) -> Scene:
        (colour, place), *others = scene.blocks
        moved = tuple(
            round(2 * scene.tips[index] - value, 6) if index == axis else value for index, value in enumerate(place)
        )
        return replace(scene, blocks=((colour, moved), *others))

    return apply


def _lower(scene: Scene) -> Scene:
    """A block cannot go above the gripper, so the gripper goes below where it has to be."""
    return replace(scene, tips=(*scene.tips[:2], _LOW_M))


def _swap_colours(scene: Scene) -> Scene:
    (first, one), (second, other), *rest = scene.blocks
    return replace(scene, blocks=((second, one), (first, other), *rest))


def _name_other(scene: Scene) -> Scene:
    return replace(scene, named=scene.blocks[1][0])


def _name_absent(scene: Scene) -> Scene:
    present = {colour for colour, _ in scene.blocks}
    return replace(scene, named=next(colour for colour in COLOURS if colour not in present))


def _reword(scene: Scene) -> Scene:
    """The next wording of its kind."""
    words = Reach.words if scene.words in Reach.words else Reach.unseen
    return replace(scene, words=words[(words.index(scene.words) + 1) % len(words)])


def _redraw(part: str) -> Callable[[Scene], Scene]:
    return lambda scene: replace(scene, **{part: scene.surroundings})


NONE = Change("none", KEEPS, "as it is", lambda scene: scene)
CHANGES = {
    change.name: change
    for change in (
        Change("mirror", TURNS, "scene mirrored", _mirror),
        Change("across-x", TURNS, "block moved past the gripper in x", _move_past(0)),
        Change("across-y", TURNS, "block moved past the gripper in y", _move_past(1)),
        Change("lowered", TURNS, "gripper lowered beside the block", _lower),
        Change("swap-colours", TURNS, "colours of two blocks swapped", _swap_colours),
        Change("name-other", TURNS, "another block named", _name_other),
        Change("camera", KEEPS, "camera moved and turned", _redraw("camera")),
        Change("light", KEEPS, "other light", _redraw("light")),
        Change("table", KEEPS, "other table", _redraw("table")),
        Change("arm", KEEPS, "other arm colour", _redraw("arm")),
        Change("distractors", KEEPS, "two more things", lambda scene: replace(scene, distractors=scene.spare)),
        Change("reworded", KEEPS, "said in other words", _reword),
        Change("negated", EMPTIES, "told not to", lambda scene: replace(scene, words=_NEGATED)),
        Change("impossible", EMPTIES, "a colour that is not there", _name_absent),
        Change("blank", EMPTIES, "blank picture", lambda scene: scene, image="blank"),
        Change("other-image", EMPTIES, "picture of a drawer instead", lambda scene: scene, image="other"),
    )
}
