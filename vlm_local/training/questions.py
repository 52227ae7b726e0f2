"""Everything that could be asked about one moment of a scene, with the oracle's answer.

One frame labels an instruction for each block on the table, or for opening and closing, or for both
places of the eggplant; so a model cannot get along with what the picture alone says.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from vlm_local.primitives import format_phrase
from vlm_local.sim.block_tasks import (
    COLOURS,
    RELATIONS,
    BlockTask,
    Lift,
    Push,
    Reach,
    ReachRelation,
    is_only_one_beside,
)
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.furniture import NUM_BLOCKS
from vlm_local.sim.levels import Level
from vlm_local.sim.memory_tasks import PutBack, ReachShown
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.task import Task
from vlm_local.sim.tasks import TASKS
from vlm_local.sim.world import World

_BODY_OF_KIND = {"drawer": "drawer", "sink": "eggplant"}
SLOTS = (*COLOURS, *_BODY_OF_KIND.values())
NO_SLOT = -1


@dataclass(frozen=True)
class Question:
    """task, names: of the simulator, see `Task.names`. instruction: in the simulator's words.

    slot: index into SLOTS of the thing that is meant, NO_SLOT for a place of which the picture shows nothing.
    offset_m: from the finger tips to it, base frame; NaN where nothing is meant.
    """

    task: str
    names: Mapping[str, str]
    instruction: str
    phrase: str
    slot: int
    offset_m: tuple[float, float, float]


def list_questions(env: SimEnv, rng: np.random.Generator) -> list[Question]:
    """The episode's own question first; the others are in words drawn anew."""
    task = env.task
    others = _vary_block(env, rng) if isinstance(task, BlockTask) else _vary_task(task, env.level, rng)
    asked = []
    for env.task in (task, *others):
        asked.append(_ask(env))
    env.task = task
    return asked


def _vary_block(env: SimEnv, rng: np.random.Generator) -> Iterator[BlockTask]:
    """The same of every other block, something else of one, and one named by its place where that is clear."""
    task: Any = env.task
    kind = Reach if isinstance(task, (ReachRelation, ReachShown, PutBack)) else type(task)
    others = [(kind, target) for target in range(NUM_BLOCKS) if kind is not type(task) or target != task.target]
    strange = [other for other in (Reach, Lift, Push) if other is not kind]
    others.append((strange[rng.integers(2)], int(rng.integers(NUM_BLOCKS))))
    for kind, target in others:
        side = ("left", "right")[rng.integers(2)]
        names = {"colour": task.colours[target]} | ({"side": side} if kind is Push else {})
        other: Any = _copy(task, kind, target)
        other.way = np.array((0, 1 if side == "left" else -1))  # of Push alone
        other.phrase_instruction(env.level, rng, names, names)
        yield other
    yield from _name_by_place(env, task, rng)


def _name_by_place(env: SimEnv, task: BlockTask, rng: np.random.Generator) -> Iterator[BlockTask]:
    """A block named by where it lies, seen from another one; none where no place says clearly which is meant."""
    places = np.array([env.world.place(f"block{index}")[:2] for index in range(NUM_BLOCKS)])
    named = [(relation, *order) for relation in RELATIONS for order in permutations(range(NUM_BLOCKS))]
    for index in rng.permutation(len(named)):
        relation, target, reference, third = named[index]
        names = {"relation": relation, "colour": task.colours[reference]}
        if names != task.names and is_only_one_beside(
            np.array(RELATIONS[relation]), *places[[target, reference, third]]
        ):
            other = _copy(task, ReachRelation, target)
            other.phrase_instruction(env.level, rng, names, names)
            yield other
            return


def _copy(task: BlockTask, kind: type[BlockTask], target: int) -> BlockTask:
    other = kind()
    vars(other).update(vars(task))
    other.target = target
    return other


def _vary_task(task: Task, level: Level, rng: np.random.Generator) -> Iterator[Task]:
    for kind in TASKS.values():
        if kind.kind == task.kind and not isinstance(task, kind):
            other = kind()
            other.phrase_instruction(level, rng)
            yield other


def _ask(env: SimEnv) -> Question:
    task = env.task
    slot, place = _find_meant(task, env.world)
    offset = np.round(place - env.world.tips, 4)
    phrase = format_phrase(Oracle(env).primitive())
    return Question(task.name, task.names, task.instruction, phrase, slot, tuple(offset.tolist()))


def _find_meant(task: Task, world: World) -> tuple[int, np.ndarray]:
    """Slot and place (3,) m of what a task is about; of a block that is to go back, where it stood."""
    if isinstance(task, PutBack):
        return NO_SLOT, task.home
    if isinstance(task, BlockTask):
        return SLOTS.index(task.colours[task.target]), world.place(f"block{task.target}")
    body = _BODY_OF_KIND[task.kind]
    return SLOTS.index(body), world.place(body)
