"""Episodes of the oracle, without pictures, under one setting."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from itertools import combinations

import numpy as np

from vlm_local.actions import STEP_M, STEP_RAD, GripperLatch, StepTable, build_action
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.ceiling.error_models import AxisErrors, ConfusionErrors, ErrorModel
from vlm_local.lab.ceiling.settings import PLAIN, Setting
from vlm_local.primitives import list_phrases, parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.types import Primitive

MAX_STEPS = 120


def play_settings(task: str, level: str, seed: int, settings: Sequence[Setting]) -> list[int | None]:
    """Control steps to success of one episode under each setting, None for none within MAX_STEPS."""
    env = _open_env(task, level)
    plain_steps, asked = play_episode(env, seed, PLAIN, AxisErrors(PLAIN, seed, MAX_STEPS), MAX_STEPS)
    steps = []
    for setting in settings:
        errors = AxisErrors(setting, seed, MAX_STEPS)
        no_error = all(errors.alter(said, step, env.world) == said for step, said in enumerate(asked))
        is_plain = no_error and _differs_in_errors_only(setting)  # the episode is the plain one: not played again
        steps.append(plain_steps if is_plain else play_episode(env, seed, setting, errors, MAX_STEPS)[0])
    return steps


def _differs_in_errors_only(setting: Setting) -> bool:
    return replace(setting, axis=PLAIN.axis, kind=PLAIN.kind, rate=PLAIN.rate) == PLAIN


def play_confused(task: str, level: str, seed: int, counts: np.ndarray, draw: str, max_steps: int) -> int | None:
    """Control steps to success with errors by confusion matrices, int (6, 3, 3); None for none within max_steps."""
    errors = ConfusionErrors(counts, draw, seed, max_steps)
    return play_episode(_open_env(task, level), seed, PLAIN, errors, max_steps)[0]


@lru_cache(maxsize=8)
def _open_env(task: str, level: str) -> SimEnv:
    return SimEnv(task, level, image_size=None)


def play_episode(
    env: SimEnv, seed: int, setting: Setting, errors: ErrorModel, max_steps: int
) -> tuple[int | None, list[Primitive]]:
    """Play one episode: oracle -> errors -> smaller vocabulary -> phrase held -> latency -> arm.

    Returns control steps to success (None for none within max_steps), and the oracle's answer each time it was asked.
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
            answer = projection[errors.alter(asked[-1], step, env.world)]
        answers.append(answer)
        primitive = answers.popleft()
        command = latch.update(primitive.gripper, env.world.opening)
        *_, over, _, info = env.step(build_action(primitive, command, table))
        if over:
            return (step + 1 if info["success"] else None), asked
    return None, asked


def scale_steps(factor: float) -> StepTable:
    """The server's step sizes times `factor`."""
    metres, turn = factor * STEP_M, factor * STEP_RAD
    return StepTable(metres, metres, metres, turn, turn)


@cache
def build_projection(grammar: str) -> dict[Primitive, Primitive]:
    """Each of the 729 movements -> the movement that a smaller grammar of grammars/ can say instead.

    Axes are dropped, never changed, and as few as possible; of equal choices (which of x, y, z is dropped when only two
    fit in a phrase) the last in types.AXES is dropped. The oracle depends on the state alone, so it asks for a
    dropped axis again at the next step.
    """
    said = {parse_phrase(sentence) for sentence in load_phrase_grammar(grammar).sentences}
    return {whole: next(part for part in _list_parts(whole) if part in said)
            for whole in map(parse_phrase, list_phrases())}  # fmt: skip


def _list_parts(primitive: Primitive) -> Iterator[Primitive]:
    """The movement with axes dropped: fewest first, then the last axes first."""
    moving = [column for column, sign in enumerate(primitive) if sign]
    for num_kept in range(len(moving), -1, -1):
        for kept in combinations(moving, num_kept):
            yield Primitive(*(sign if column in kept else 0 for column, sign in enumerate(primitive)))
