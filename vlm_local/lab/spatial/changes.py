"""What is done to a scene, and what the right answer then does."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vlm_local.lab.spatial.scenes import Scene
from vlm_local.sim.block_tasks import COLOURS, Reach

TURNS, KEEPS, EMPTIES = "turns", "keeps", "empties"
_LOW_M = 0.018  # beside a block and below its top
_NEGATED = "do not go to the {colour} block, stay where you are"


@dataclass(frozen=True)
class Change:
    """rule: what the right answer does: it "turns" (an axis changes sign), "keeps", or there is none any
    more and confidence must go ("empties"). image: "same" as drawn, "blank", or "other" (of a drawer).
    """

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
