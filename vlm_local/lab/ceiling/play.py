"""Episodes of the oracle, without pictures, under one setting."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from vlm_local.actions import STEP_M, STEP_RAD, GripperLatch, StepTable, build_action
from vlm_local.lab.ceiling.mistakes import Confused, Mistakes, Slips
from vlm_local.lab.ceiling.settings import PLAIN, Setting
from vlm_local.lab.ceiling.vocabulary import build_projection
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.types import Primitive

MAX_STEPS = 120


def play_settings(task: str, level: str, seed: int, settings: Sequence[Setting]) -> list[int | None]:
    """Control steps to success of one episode under each setting, None for none within MAX_STEPS."""
    env = _open_env(task, level)
    plain_steps, asked = play_episode(env, seed, PLAIN, Slips(PLAIN, seed, MAX_STEPS), MAX_STEPS)
    steps = []
    for setting in settings:
        slips = Slips(setting, seed, MAX_STEPS)
        is_same = _only_slips(setting) and all(slips.alter(p, step, env.world) == p for step, p in enumerate(asked))
        steps.append(plain_steps if is_same else play_episode(env, seed, setting, slips, MAX_STEPS)[0])
    return steps


def _only_slips(setting: Setting) -> bool:
    """Where no slip falls on an axis that moves, such an episode is the plain one."""
    return replace(setting, axis=PLAIN.axis, kind=PLAIN.kind, rate=PLAIN.rate) == PLAIN


def play_confused(task: str, level: str, seed: int, counts: np.ndarray, draw: str, max_steps: int) -> int | None:
    """Control steps to success through a confusion, int (6, 3, 3); None for none within max_steps."""
    confused = Confused(counts, draw, seed, max_steps)
    return play_episode(_open_env(task, level), seed, PLAIN, confused, max_steps)[0]


@lru_cache(maxsize=8)
def _open_env(task: str, level: str) -> SimEnv:
    return SimEnv(task, level, image_size=None)


def play_episode(
    env: SimEnv, seed: int, setting: Setting, mistakes: Mistakes, max_steps: int
) -> tuple[int | None, list[Primitive]]:
    """Oracle -> mistakes -> vocabulary -> held -> late -> arm.

    Returns control steps to success, or None, and what the oracle said each time it was asked.
    """
    env.reset(seed=seed)
    table, projection = scale_steps(setting.scale), build_projection(setting.grammar)
    oracle, latch = Oracle(env, scale_steps(setting.rest)), GripperLatch()
    asked: list[Primitive] = []
    answer = Primitive()
    answers = deque([answer] * setting.latency)  # under way to the arm
    for step in range(max_steps):
        if step % setting.hold == 0:
            asked.append(oracle.primitive())
            answer = projection[mistakes.alter(asked[-1], step, env.world)]
        answers.append(answer)
        primitive = answers.popleft()
        command = latch.update(primitive.gripper, env.world.opening)
        *_, over, _, info = env.step(build_action(primitive, command, table))
        if over:
            return (step + 1 if info["success"] else None), asked
    return None, asked


def scale_steps(factor: float) -> StepTable:
    metres, turn = factor * STEP_M, factor * STEP_RAD
    return StepTable(metres, metres, metres, turn, turn)
