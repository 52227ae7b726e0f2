"""Tasks that need memory: a cue is in the first pictures of an episode, and nothing later tells what it showed.

While the cue is shown the arm waits, whatever it is told, and the physics stand still. The cue is in the pictures
alone, so all that is observed afterwards is the same whatever was shown: no policy that does not remember the first
pictures does better than `chance` (tests/sim/test_memory_tasks.py).
"""

from typing import ClassVar

import numpy as np

from vlm_local.sim.block_tasks import NAMED, SIDES, Push, Reach
from vlm_local.sim.furniture import BLOCK_HALF_M, NUM_BLOCKS
from vlm_local.sim.task import combine

_CUE_STEPS = 5  # a second
_MARK = (1.0, 0.15, 0.85)  # pink: no block and no distractor has it
_MOVED_M = 0.07
_BACK_M = (0.025, 0.05)  # this near to its old place, along the way and across, a block is back
_WRONG_M = 0.04  # less than the least way back: who tries both ways has lost by then


class ReachShown(Reach):
    """Bring the finger tips to the block that was pink in the first pictures. The first block reached counts."""

    name = "reach_shown"
    cue_steps = _CUE_STEPS
    chance: ClassVar[float] = 1 / NUM_BLOCKS
    words = combine(
        ("reach", "move to", "go to", "touch", "head for", "move the gripper to"),
        ("the marked block", "the block marked before", "the block shown first", "the block of the mark"),
    )
    unseen = ("approach the cube that bore the mark", "find what the mark was on")
    wrong_words = "reach the {colour} block"

    def sample(self, world, level, rng):
        self.sample_blocks(world, level, rng)
        self.target = int(rng.integers(NUM_BLOCKS))
        self.phrase_instruction(level, rng, {}, {"colour": self.colours[self.target - 1]})

    def show_cue(self, world):
        world.paint(f"block{self.target}", _MARK)


class PutBack(Push):
    """Move the named block back to where it stood, in pink, in the first pictures: left or right of where it is now."""

    name = "put_back"
    stages = ("reached", "put back")
    cue_steps = _CUE_STEPS
    chance: ClassVar[float] = 1 / len(SIDES)
    words = combine(("put", "push", "move", "slide", "bring"), NAMED, ("back", "back to its old place"))
    unseen = ("return the {colour} cube to where it was", "the {colour} block should be where it stood before")

    def sample(self, world, level, rng):
        self.way = np.array(list(SIDES.values())[rng.integers(len(SIDES))])
        self.sample_blocks(world, level, rng)
        self.phrase_instruction(level, rng, {"colour": self.colours[0]}, {"colour": self.colours[1]})

    def fits(self, places):
        """Room on both sides alike, so that room does not tell the way."""
        away = abs(places[1:] - places[0])
        blocked = (away[:, 0] < 0.07) & (away[:, 1] < 0.16)
        return abs(places[0, 1]) < 0.10 and not blocked.any()

    @property
    def home(self) -> np.ndarray:
        """(3,) m: where the block stood in the first pictures."""
        return np.append(self.starts[self.target, :2] + _MOVED_M * self.way, BLOCK_HALF_M)

    def show_cue(self, world):
        block = f"block{self.target}"
        world.put(block, tuple(self.home), world.yaw(block))
        world.paint(block, _MARK)

    def is_done(self, world):
        missing = abs(world.place(f"block{self.target}") - self.home)[:2]
        return bool(missing @ abs(self.way) < _BACK_M[0] and missing @ abs(self.way[::-1]) < _BACK_M[1])

    def is_lost(self, world):
        return bool(self._move(world, self.target) @ self.way < -_WRONG_M) or super().is_lost(world)
