"""An environment with its oracle: episodes with pictures, and what the oracle and random phrases reach in them."""

from dataclasses import dataclass

import numpy as np

from vlm_local.actions import GripperLatch, build_action
from vlm_local.environments import Outcome, TaskEnvironment, find_suite
from vlm_local.grammar import load_phrase_grammar
from vlm_local.policy import draw_phrase
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.types import Observation

_counted: dict[tuple[str | int, ...], int | None] = {}  # steps to success by who acts and in which episode


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

    @property
    def ended(self) -> str | None:
        """ "success" or "lost", None while the episode goes on."""
        return "success" if self.success else "lost" if self.lost else None


class Environment:
    """Episodes of any task at one level. Keeps the environments of one task, as tasks are played one after another."""

    def __init__(self, suite: str, level: str, image_size: int):
        """suite: of environments.SUITES. image_size: pixels a side."""
        self._suite = find_suite(suite)
        self._level, self._image_size = level, image_size
        self._open_task: tuple[str, TaskEnvironment, TaskEnvironment] | None = None

    def reset(self, task: str, seed: int, drawn: bool = True) -> State:
        """drawn: with pictures; without, images are (0, 0, 3) and steps take a fifth of the time."""
        with_pictures, without = self._open(task)
        self._env = with_pictures if drawn else without
        self._env.reset(seed)
        return self._build_state(Outcome())

    def step(self, action: np.ndarray) -> State:
        """action: (7,), as TaskEnvironment.step takes it."""
        return self._build_state(self._env.step(action))

    def count_steps(self, who: str, task: str, seed: int, max_steps: int) -> int | None:
        """Steps to success on this episode of the "oracle" (the ceiling) or of "random" phrases (the floor).

        None where it fails. Counted once in a process: the results that are verified together are often of the same
        episodes.
        """
        episode = (who, self._suite.name, task, self._level, seed, max_steps)
        if episode not in _counted:
            _counted[episode] = self._count_steps(who, self._open(task)[1], seed, max_steps)
        return _counted[episode]

    def _open(self, task: str) -> tuple[TaskEnvironment, TaskEnvironment]:
        """A task's environments with and without pictures, made where they are not those of the last call."""
        if self._open_task is not None and self._open_task[0] != task:
            self._open_task[1].close()
            self._open_task = None
        if self._open_task is None:
            make = self._suite.open
            self._open_task = task, make(task, self._level, self._image_size), make(task, self._level, None)
        return self._open_task[1:]

    def _build_state(self, outcome: Outcome) -> State:
        env = self._env
        return State(env.observation, env.wrong_instruction, format_phrase(env.ask_oracle()), *outcome)

    def _count_steps(self, who: str, env: TaskEnvironment, seed: int, max_steps: int) -> int | None:
        latch, phrases = GripperLatch(), load_phrase_grammar().sentences
        env.reset(seed)
        for step in range(max_steps):
            primitive = env.ask_oracle() if who == "oracle" else parse_phrase(draw_phrase(phrases, seed, step))
            command = latch.update(primitive.gripper, env.observation.opening)
            outcome = env.step(build_action(primitive, command, self._suite.table))
            if outcome.success or outcome.lost:
                return step + 1 if outcome.success else None
        return None
