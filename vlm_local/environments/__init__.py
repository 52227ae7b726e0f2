"""Environments in which policies are played: what a rollout needs of one, and the suites that there are.

    suite = find_suite("metaworld")                 # "ours": the simulator of sim/
    env = suite.open("reach-v3", "normal", 256)     # one task
    env.reset(7)
    env.observation, env.ask_oracle()               # types.Observation, types.Primitive
    outcome = env.step(action)                      # (7,) as types.Decision.action

Nothing heavy is imported before `find_suite`. How to add an environment: docs/environments.md.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np

from vlm_local.actions import StepTable
from vlm_local.errors import ConfigError, suggest
from vlm_local.types import Observation, Primitive

OURS, METAWORLD, LIBERO, SIMPLER = SUITES = ("ours", "metaworld", "libero", "simpler")  # a module of this folder each


class Outcome(NamedTuple):
    """success, lost: the episode is over. stage: furthest of the task's stages so far, counted from 1; 0 for none."""

    success: bool = False
    lost: bool = False
    stage: int = 0


class TaskEnvironment(Protocol):
    """One task. Not thread-safe. An episode depends on its seed and the actions alone."""

    @property
    def wrong_instruction(self) -> str:
        """Asks for something else than the episode's instruction."""
        ...

    @property
    def observation(self) -> Observation:
        """The present. Its image is (0, 0, 3) where nothing is drawn."""
        ...

    def reset(self, seed: int) -> None:
        """Start the episode of this seed, 0 <= seed < 2**64."""

    def step(self, action: np.ndarray) -> Outcome:
        """Carry out one action for one control step: (7,) as types.Decision.action, in the base frame."""
        ...

    def ask_oracle(self) -> Primitive:
        """What to do now, from ground truth. Asking changes nothing."""
        ...

    def close(self) -> None:
        """Let go of the renderer."""


@dataclass(frozen=True)
class Suite:
    """Tasks that share a robot.

    stages: task -> names of its stages, in order. apart: those of them that are not meant by "all". levels: of
    difficulty. max_steps: control steps of an episode, where the user says nothing else; limit: the most that there
    may be. embodiment: name of the robot's file, None where the policy's own choice holds. table: steps of the oracle.
    open: (task, level, pixels a side or None for no pictures) -> environment.
    """

    name: str
    stages: Mapping[str, tuple[str, ...]]
    levels: tuple[str, ...]
    control_hz: float
    max_steps: int
    embodiment: str | None
    table: StepTable
    open: Callable[[str, str, int | None], TaskEnvironment]
    apart: tuple[str, ...] = ()
    limit: int = 10_000  # half an hour at 5 Hz; who verifies a result has to play as many

    @property
    def tasks(self) -> tuple[str, ...]:
        """What "all" means."""
        return tuple(task for task in self.stages if task not in self.apart)

    def choose(self, names: str) -> tuple[str, ...]:
        """Tasks from "all", or from names with commas between; "NAME" also stands for all of "NAME/..."."""
        if names == "all":
            return self.tasks
        found: list[str] = []
        for name in map(str.strip, names.split(",")):
            found += [task for task in self.tasks if task.startswith(f"{name}/")] or [name]
        return tuple(dict.fromkeys(found))

    def stages_of(self, tasks: Sequence[str]) -> dict[str, tuple[str, ...]]:
        return {task: self.stages[task] for task in tasks}

    def check(self, tasks: Sequence[str], level: str, max_steps: int | None = None) -> None:
        """Raises ConfigError for what the suite does not have."""
        _require_one_of(self.levels, "level", level)
        for task in tasks:
            _require_one_of(self.stages, "task", task)
        if max_steps is not None and max_steps > self.limit:
            raise ConfigError(f"an episode of {self.name} has at most {self.limit} steps: --max-steps {max_steps}")


def _require_one_of(known: Collection[str], what: str, name: str) -> None:
    if name not in known:
        raise ConfigError(f"{what} must be one of {', '.join(known)}, not {name!r}{suggest(name, known)}")


def import_package(env: str, *names: str) -> tuple[Any, ...]:
    """The modules of an environment's package, by name: it is not among those that types are checked with.

    Raises ConfigError where it is not installed.
    """
    try:
        return tuple(import_module(name) for name in names)
    except ImportError as error:
        raise ConfigError(
            f"--env {env} needs a package that is not here ({error}): .venv/bin/pip install -e '.[{env}]'"
        ) from None


def name_robot(task: str) -> str:
    """The task's name in recordings and folders."""
    return task.replace("/", "-")


def name_episode(task: str, number: int) -> str:
    """Of its folder below episodes/ of a run."""
    return f"{name_robot(task)}-{number}"


def find_suite(name: str) -> Suite:
    """Raises ConfigError for an unknown name, and where the environment's package is missing."""
    _require_one_of(SUITES, "environment", name)
    return import_module(f"{__name__}.{name}").SUITE
