"""Everything that could be asked about one moment of a scene, with the oracle's answer.

One frame labels an instruction for each block on the table, or for opening and closing, or for both
places of the eggplant; so a model cannot get along with what the picture alone says.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm_local.primitives import format_phrase
from vlm_local.sim.block_tasks import COLOURS, BlockTask, Reach, ReachRelation
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.levels import Level
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.task import Task
from vlm_local.sim.tasks import TASKS

_BODY_OF_KIND = {"drawer": "drawer", "sink": "eggplant"}
SLOTS = (*COLOURS, *_BODY_OF_KIND.values())


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


def _vary_block(task: BlockTask, level: Level, rng: np.random.Generator) -> Iterator[BlockTask]:
    """The same of every other block; where a block is named by its place, also by its colour."""
    kind = Reach if isinstance(task, ReachRelation) else type(task)
    for target, colour in enumerate(task.colours):
        if kind is type(task) and target == task.target:
            continue
        other = kind()
        vars(other).update(vars(task))
        other.target = target
        side = ("left", "right")[rng.integers(2)]
        other.way = np.array((0, 1 if side == "left" else -1))  # of Push alone
        names = {"colour": colour, "side": side}
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
