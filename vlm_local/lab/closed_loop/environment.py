"""An environment with its oracle: episodes with pictures, and what the oracle and random phrases reach in them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlm_local.actions import GripperLatch, build_action
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import draw_uniform
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.types import Observation, Primitive


@dataclass(frozen=True, eq=False)
class State:
    """The environment after a reset or a step.

    oracle: the oracle's phrase for this state. wrong_instruction: asks for something else here.
    success, lost: the episode is over. stage: furthest of the task's stages, counted from 1.
    """

    observation: Observation
    wrong_instruction: str
    oracle: str
    success: bool = False
    lost: bool = False
    stage: int = 0


class Environment:
    """Episodes of any task at one level. Keeps the simulators of one task, as tasks are played one after another."""

    def __init__(self, level: str, image_size: int):
        """image_size: pixels a side."""
        self._level, self._image_size = level, image_size
        self._open_task: tuple[str, SimEnv, SimEnv] | None = None
        self._phrases = load_phrase_grammar().sentences

    def reset(self, task: str, seed: int, drawn: bool = True) -> State:
        """drawn: with pictures; without, images are (0, 0, 3) and steps take a fifth of the time."""
        with_pictures, without = self._open(task)
        self._env = with_pictures if drawn else without
        self._env.reset(seed=seed)
        self._oracle = Oracle(self._env)
        return self._build_state({})

    def step(self, action: np.ndarray) -> State:
        """action: (7,), as SimEnv.step takes it."""
        *_, info = self._env.step(action)
        return self._build_state(info)

    def count_oracle_steps(self, task: str, seed: int, max_steps: int) -> int | None:
        """Steps to success of the oracle on this episode, None where it fails: the ceiling."""
        _, env = self._open(task)
        oracle = Oracle(env)
        return _count_steps(env, seed, max_steps, lambda step: oracle.primitive())

    def count_random_steps(self, task: str, seed: int, max_steps: int) -> int | None:
        """Steps to success of random phrases on this episode, None where they fail: the floor."""
        _, env = self._open(task)
        return _count_steps(env, seed, max_steps, lambda step: parse_phrase(self._draw_phrase(seed, step)))

    def _open(self, task: str) -> tuple[SimEnv, SimEnv]:
        """The simulators of a task with and without pictures, made where they are not those of the last call."""
        if self._open_task is not None and self._open_task[0] != task:
            self._open_task[1].close()
            self._open_task = None
        if self._open_task is None:
            self._open_task = task, SimEnv(task, self._level, self._image_size), SimEnv(task, self._level, None)
        return self._open_task[1:]

    def _build_state(self, info: dict) -> State:
        outcome = {name: info[name] for name in ("success", "lost", "stage") if name in info}
        phrase = format_phrase(self._oracle.primitive())
        return State(self._env.observation, self._env.task.wrong_instruction, phrase, **outcome)

    def _draw_phrase(self, seed: int, step: int) -> str:
        return self._phrases[int(draw_uniform(seed, step) * len(self._phrases))]


def _count_steps(env: SimEnv, seed: int, max_steps: int, choose: Callable[[int], Primitive]) -> int | None:
    """Steps to success with what `choose` says at each step, or None."""
    latch = GripperLatch()
    env.reset(seed=seed)
    for step in range(max_steps):
        primitive = choose(step)
        command = latch.update(primitive.gripper, env.world.opening)
        _, _, over, _, info = env.step(build_action(primitive, command))
        if over:
            return step + 1 if info["success"] else None
    return None
