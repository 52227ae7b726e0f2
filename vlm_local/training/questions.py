"""Everything that could be asked about one moment of a scene, with the oracle's answer.

One frame labels an instruction for each block on the table, or for opening and closing, or for both
places of the eggplant; so a model cannot get along with what the picture alone says.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm_local.primitives import format_phrase
from vlm_local.sim.block_tasks import COLOURS, BlockTask, Lift, Push, Reach, ReachRelation
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.furniture import NUM_BLOCKS
from vlm_local.sim.levels import Level
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.task import Task
from vlm_local.sim.tasks import TASKS

_BODY_OF_KIND = {"drawer": "drawer", "sink": "eggplant"}
SLOTS = (*COLOURS, *_BODY_OF_KIND.values())

# Words that mean nothing here, and that no instruction of the level `words` uses.
_FILLERS = (
    *("now", "then", "just", "so", "again", "next", "slowly", "carefully", "gently", "quickly", "straight", "robot"),
    *("its", "this", "small", "little", "big", "round", "wooden", "metal", "large", "hand", "base", "corner", "toy"),
    *("first", "second", "third", "near", "from", "by", "for", "or", "and", "a", "an", "all", "to", "on", "over"),
    *("bowl", "cup", "plate", "pot", "box", "ball", "towel", "carrot", "banana", "corn", "white", "black", "orange"),
)
_MAX_FILLERS = 3


@dataclass(frozen=True)
class Question:
    """slot: index into SLOTS of the thing that is meant. offset_m: from the finger tips to it, base frame."""

    instruction: str
    phrase: str
    slot: int
    offset_m: tuple[float, float, float]


def list_questions(env: SimEnv, rng: np.random.Generator) -> list[Question]:
    """The episode's own question first; the others are in words drawn anew."""
    task = env.task
    others = _vary_block(task, env.level, rng) if isinstance(task, BlockTask) else _vary_task(task, env.level, rng)
    asked = []
    for env.task in (task, *others):
        asked.append(_ask(env))
    env.task = task
    return asked


def add_fillers(instruction: str, rng: np.random.Generator) -> str:
    """The instruction with up to three words more that mean nothing, so that strange words are read over."""
    words = instruction.split(" ")
    for _ in range(rng.integers(_MAX_FILLERS + 1)):
        words.insert(rng.integers(len(words) + 1), _FILLERS[rng.integers(len(_FILLERS))])
    return " ".join(words)


def _vary_block(task: BlockTask, level: Level, rng: np.random.Generator) -> Iterator[BlockTask]:
    """The same of every other block, and something else of one; a block named by its place also by its colour."""
    kind = Reach if isinstance(task, ReachRelation) else type(task)
    others = [(kind, target) for target in range(NUM_BLOCKS) if kind is not type(task) or target != task.target]
    strange = [other for other in (Reach, Lift, Push) if other is not kind]
    others.append((strange[rng.integers(2)], int(rng.integers(NUM_BLOCKS))))
    for kind, target in others:
        other: Any = kind()
        vars(other).update(vars(task))
        other.target = target
        side = ("left", "right")[rng.integers(2)]
        other.way = np.array((0, 1 if side == "left" else -1))  # of Push alone
        names = {"colour": task.colours[target], "side": side}
        other.phrase_instruction(level, rng, names, names)
        yield other


def _vary_task(task: Task, level: Level, rng: np.random.Generator) -> Iterator[Task]:
    for kind in TASKS.values():
        if kind.kind == task.kind and not isinstance(task, kind):
            other = kind()
            other.phrase_instruction(level, rng)
            yield other


def _ask(env: SimEnv) -> Question:
    task = env.task
    if isinstance(task, BlockTask):
        slot, body = SLOTS.index(task.colours[task.target]), f"block{task.target}"
    else:
        body = _BODY_OF_KIND[task.kind]
        slot = SLOTS.index(body)
    offset = np.round(env.world.place(body) - env.world.tips, 4)
    return Question(task.instruction, format_phrase(Oracle(env).primitive()), slot, tuple(offset.tolist()))
