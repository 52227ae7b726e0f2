"""The simulator of sim/ as a TaskEnvironment."""

import numpy as np

from vlm_local.actions import StepTable
from vlm_local.environments import OURS, Outcome, Suite
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.levels import LEVELS
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.tasks import MEMORY_TASKS, TASKS
from vlm_local.types import Observation, Primitive


class _Simulated:
    """A SimEnv with its oracle."""

    def __init__(self, task: str, level: str, image_size: int | None):
        self._env = SimEnv(task, level, image_size)
        self._oracle = Oracle(self._env)

    @property
    def observation(self) -> Observation:
        return self._env.observation

    @property
    def wrong_instruction(self) -> str:
        return self._env.task.wrong_instruction

    def reset(self, seed: int) -> None:
        self._env.reset(seed=seed)

    def step(self, action: np.ndarray) -> Outcome:
        *_, info = self._env.step(action)
        return Outcome(info["success"], info["lost"], info["stage"])

    def ask_oracle(self) -> Primitive:
        return self._oracle.primitive()

    def close(self) -> None:
        self._env.close()


SUITE = Suite(
    name=OURS,
    stages={name: task.stages for name, task in {**TASKS, **MEMORY_TASKS}.items()},
    levels=tuple(LEVELS),
    control_hz=5,
    max_steps=120,
    embodiment=None,
    table=StepTable(),
    open=_Simulated,
    apart=tuple(MEMORY_TASKS),
)
