"""Tasks with blocks of different colours on the table."""

import numpy as np

from vlm_local.sim.furniture import BLOCK_HALF_M, NUM_BLOCKS
from vlm_local.sim.levels import Level
from vlm_local.sim.task import Task, combine, sample_start
from vlm_local.sim.world import World

COLOURS = {
    "red": (0.80, 0.10, 0.10),
    "green": (0.12, 0.58, 0.18),
    "blue": (0.10, 0.25, 0.80),
    "yellow": (0.92, 0.78, 0.10),
    "purple": (0.48, 0.16, 0.60),
}
_USUAL_COLOURS = 3
_DISTRACTOR_COLOURS = ((0.85, 0.85, 0.83), (0.25, 0.25, 0.27), (0.55, 0.40, 0.30))

# Centre and half size of where blocks lie, m.
_BLOCK_AREA = np.array([[0.31, 0.01], [0.10, 0.16]])
_APART_M = 0.10
REACH_HEIGHT_M = 2 * BLOCK_HALF_M + 0.005  # tips just above the block
_REACHED_ACROSS_M = 0.018
_LIFTED_M = 0.05
_PUSHED_M = 0.05
_REACHED_HEIGHT_M = REACH_HEIGHT_M + 0.010

_REACHING = ("reach", "move to", "go to", "touch", "head for", "come to", "move the gripper to", "bring the gripper to")
NAMED = ("the {colour} block", "the {colour} brick", "the {colour} thing", "the {colour} object")


class BlockTask(Task):
    """Blocks of different colours on the table; `target` is the one that is meant."""

    kind = "blocks"

    def sample(self, world, level, rng):
        """The target is named by its colour; another block would be another answer."""
        self.sample_blocks(world, level, rng)
        self.phrase_instruction(level, rng, {"colour": self.colours[0]}, {"colour": self.colours[1]})

    def sample_blocks(self, world: World, level: Level, rng: np.random.Generator) -> None:
        """Three blocks and perhaps distractors, where `fits` has nothing against it."""
        self.colours = draw_colours(level, rng)
        num_distractors = int(rng.integers(level.distractors + 1))
        self.target = 0  # of the blocks, whose colours are in random order
        while not self.fits(places := _scatter(NUM_BLOCKS + num_distractors, level, rng)):
            pass
        for index, (colour, place) in enumerate(zip(self.colours, places, strict=False)):
            world.put(f"block{index}", (*place, BLOCK_HALF_M), yaw=level.spread * rng.uniform(-0.5, 0.5))
            world.paint(f"block{index}", np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.05, 0.05, 3), 0, 1))
        for index, place in enumerate(places[NUM_BLOCKS:]):
            world.put(f"distractor{index}", (*place, 0.025))
            world.paint(f"distractor{index}", _DISTRACTOR_COLOURS[rng.integers(len(_DISTRACTOR_COLOURS))])
        world.put_arm(sample_start(level, rng))
        self.starts = np.array([world.place(f"block{index}") for index in range(NUM_BLOCKS)])

    def fits(self, places: np.ndarray) -> bool:
        """Whether the episode can be played with things at these places (N, 2) m, blocks first."""
        return True


def draw_colours(level: Level, rng: np.random.Generator) -> list[str]:
    """Names of the blocks' colours, each another one."""
    names = list(COLOURS)[: None if level.more_colours else _USUAL_COLOURS]
    return [str(name) for name in rng.permutation(names)[:NUM_BLOCKS]]


def _scatter(num: int, level: Level, rng: np.random.Generator) -> np.ndarray:
    """(num, 2) m: places on the table that keep apart."""
    centre, half = _BLOCK_AREA
    while True:
        places = centre + level.spread * half * rng.uniform(-1, 1, (num, 2))
        gaps = np.linalg.norm(places[:, None] - places[None], axis=2) + np.eye(num)
        if gaps.min() >= _APART_M * (0.5 + 0.5 * level.spread):
            return places


def _is_over(world: World, body: str) -> bool:
    offset = world.tips - world.place(body)
    return bool(np.hypot(*offset[:2]) < _REACHED_ACROSS_M and world.tips[2] < _REACHED_HEIGHT_M)


class Reach(BlockTask):
    """Bring the finger tips to the named block. The first block reached counts."""

    name = "reach"
    stages = ("reached",)
    words = combine(_REACHING, NAMED)
    unseen = (
        "put your gripper at the {colour} cube",
        "approach the block that is {colour}",
        "the {colour} one, please: go there",
    )

    def is_done(self, world):
        return _is_over(world, f"block{self.target}")

    def is_lost(self, world):
        return any(_is_over(world, f"block{index}") for index in range(NUM_BLOCKS) if index != self.target)


SIDES = {"left": (0, 1), "right": (0, -1)}
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "behind": (1, 0), "in front of": (-1, 0)}


def is_only_one_beside(side: np.ndarray, target: np.ndarray, reference: np.ndarray, other: np.ndarray) -> bool:
    """Whether `target` lies clearly on that side of `reference`, and `other` clearly does not.

    side: (2,), a unit vector of RELATIONS. target, reference, other: (2,) m.
    """
    along, across = ((np.array([target, other]) - reference) @ np.stack([side, side[::-1]], axis=1)).T
    return bool(along[0] > 0.08 and abs(across[0]) < 0.06 and along[1] < 0.02)


class ReachRelation(Reach):
    """As Reach; the block is named by where it lies, seen from another block."""

    name = "reach_relation"
    words = combine(
        _REACHING, ("the block", "the one"), ("{relation} the {colour} one", "{relation} the {colour} block")
    )
    unseen = (
        "find the {colour} block and approach the one {relation} it",
        "touch what lies {relation} the {colour} cube",
    )

    def sample(self, world, level, rng):
        side = int(rng.integers(len(RELATIONS)))
        relations = list(RELATIONS)
        self._side = np.array(RELATIONS[relations[side]])
        self.sample_blocks(world, level, rng)
        names = {"relation": relations[side], "colour": self.colours[1]}
        self.phrase_instruction(level, rng, names, names | {"relation": relations[side ^ 1]})

    def fits(self, places):
        return is_only_one_beside(self._side, places[0], places[1], places[2])


class Lift(BlockTask):
    """Lift the named block off the table; lifting another one is no success."""

    name = "lift"
    stages = ("reached", "grasped", "lifted")
    words = combine(("lift", "pick up", "raise", "lift up", "grasp and lift"), NAMED)
    unseen = ("take the {colour} cube off the table", "the {colour} block, please: up with it")

    def is_done(self, world):
        return self._rise(world, self.target) > _LIFTED_M and world.count_pads("block0") == 2

    def is_lost(self, world):
        return any(self._rise(world, index) > _LIFTED_M for index in (1, 2))

    def count_stages(self, world):
        if self.is_done(world):
            return 3
        near = np.linalg.norm(world.place("block0") - world.tips) < 0.03
        return 2 if world.count_pads("block0") == 2 else int(near)

    def _rise(self, world: World, index: int) -> float:
        return world.place(f"block{index}")[2] - self.starts[index, 2]


class Push(BlockTask):
    """Push the named block to one side; `way` (2,) is the unit vector of that side."""

    name = "push"
    stages = ("reached", "pushed")
    words = combine(("push", "move", "slide"), NAMED, ("to the {side}", "{side}", "towards the {side}"))
    unseen = ("shove the {colour} cube {side}wards", "the {colour} block should be further {side}")

    def sample(self, world, level, rng):
        side = ("left", "right")[rng.integers(2)]
        self.way = np.array(SIDES[side])
        self.sample_blocks(world, level, rng)
        names = {"colour": self.colours[0], "side": side}
        self.phrase_instruction(level, rng, names, names | {"side": "right" if side == "left" else "left"})

    def fits(self, places):
        """Room for the block to go and for the gripper on its other side, nothing in between."""
        along, across = ((places[1:] - places[0]) @ np.stack([self.way, self.way[::-1]], axis=1)).T
        blocked = (abs(across) < 0.07) & (along > -0.12) & (along < 0.16)
        return abs(places[0, 1]) < 0.10 and not blocked.any()

    def is_done(self, world):
        moved = self._move(world, self.target)
        return bool(moved @ self.way > _PUSHED_M and abs(moved @ self.way[::-1]) < _PUSHED_M)

    def is_lost(self, world):
        return any(np.linalg.norm(self._move(world, index)) > _PUSHED_M for index in (1, 2))

    def count_stages(self, world):
        return 2 if self.is_done(world) else int(is_ready_to_push(world, "block0", self.way))

    def _move(self, world: World, index: int) -> np.ndarray:
        return (world.place(f"block{index}") - self.starts[index])[:2]


def is_ready_to_push(world: World, block: str, way: np.ndarray) -> bool:
    """The tips are down beside the block, on the side that it shall leave."""
    offset = world.place(block) - world.tips
    along, across = offset[:2] @ way, offset[:2] @ way[::-1]
    return bool(0.01 < along < 0.075 and abs(across) < 0.016 and world.tips[2] < 0.036)
