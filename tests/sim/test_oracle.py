"""The oracle solves every task in phrases, also when it is disturbed, and its answer is of the state alone."""

import numpy as np
import pytest

from tests.slow import slow
from vlm_local.actions import GripperLatch, build_action
from vlm_local.primitives import list_phrases, parse_phrase
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.tasks import MEMORY_TASKS, TASKS
from vlm_local.types import Primitive

MAX_STEPS = 120
ONE_OF_A_KIND = ("lift", "open_drawer", "eggplant_in_sink", "put_back")


def play(env: SimEnv, seed: int, noise: float = 0.0) -> tuple[bool, int]:
    """-> (success, steps) of the oracle, a share of whose phrases is random."""
    env.reset(seed=seed)
    oracle, latch, rng = Oracle(env), GripperLatch(), np.random.default_rng(seed)
    for _ in range(MAX_STEPS):
        primitive = oracle.primitive()
        if rng.random() < noise:
            primitive = parse_phrase(list_phrases()[rng.integers(729)])
        *_, over, _, info = env.step(build_action(primitive, latch.update(primitive.gripper, env.world.opening)))
        if over:
            break
    return info["success"], info["step"]


@pytest.mark.parametrize("seeds", [range(1), slow(range(1, 4))])
@pytest.mark.parametrize("task", [*TASKS, *MEMORY_TASKS])
def test_the_oracle_succeeds(task, seeds):
    env = SimEnv(task, image_size=None)
    results = [play(env, seed) for seed in seeds]
    assert all(success for success, _ in results)
    assert max(steps for _, steps in results) <= 70


@pytest.mark.parametrize("task", [task if task in ONE_OF_A_KIND else slow(task) for task in (*TASKS, *MEMORY_TASKS)])
def test_the_oracle_recovers_from_random_phrases(task):
    env = SimEnv(task, image_size=None)
    assert sum(play(env, seed, noise=0.2)[0] for seed in range(4)) >= 3


@pytest.mark.parametrize("task", ["lift", "open_drawer", "eggplant_in_basket", "reach"])
def test_when_the_task_is_done_it_stands_still(task):
    """A station plays an episode to its last step: what was done must still be so there."""
    env = SimEnv(task, image_size=None)
    env.reset(seed=1)
    oracle, latch, done = Oracle(env), GripperLatch(), False
    for _ in range(70):
        primitive = oracle.primitive()
        *_, info = env.step(build_action(primitive, latch.update(primitive.gripper, env.world.opening)))
        assert info["success"] or not done
        done = info["success"]
    assert done and primitive == Primitive()


def test_random_phrases_get_nowhere():
    env = SimEnv("lift", image_size=None)
    assert not play(env, 0, noise=1.0)[0]


def test_the_first_block_reached_counts():
    env = SimEnv("reach", image_size=None)
    env.reset(seed=0)
    env.task.target = 1
    oracle = Oracle(env)
    for _ in range(MAX_STEPS):
        primitive = oracle.primitive()
        env.task.target = 0  # the oracle is after another block than the judge
        *_, over, _, info = env.step(build_action(primitive, 1.0))
        env.task.target = 1
        if over:
            break
    assert info["lost"] and not info["success"]


def test_a_phrase_never_undoes_the_one_before():
    """No two-step cycles: in a run without disturbance no axis goes back at once."""
    for task in ("reach", "lift", "open_drawer"):
        env = SimEnv(task, image_size=None)
        env.reset(seed=1)
        oracle, latch, before = Oracle(env), GripperLatch(), Primitive()
        for _ in range(MAX_STEPS):
            primitive = oracle.primitive()
            assert all(now * then >= 0 for now, then in zip(primitive[:2], before[:2], strict=True)), task
            *_, over, _, _ = env.step(build_action(primitive, latch.update(primitive.gripper, env.world.opening)))
            before = primitive
            if over:
                break
