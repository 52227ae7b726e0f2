"""The memory tasks: after the cue, observations are equal whatever it showed, and actions suit one answer alone."""

from collections import Counter
from contextlib import closing

import numpy as np
import pytest

from vlm_local.actions import GripperLatch, build_action
from vlm_local.environments import find_suite
from vlm_local.sim.environment import SimEnv
from vlm_local.sim.oracle import Oracle
from vlm_local.sim.tasks import MEMORY_TASKS, TASKS

# Of each task: the field that says what was shown, and all its values.
ANSWERS = {
    "reach_shown": ("target", [0, 1, 2]),
    "put_back": ("way", [np.array([0, 1]), np.array([0, -1])]),
}
SEED = 3
MAX_STEPS = 120


def play(task: str, answer, actions=None) -> tuple[list[dict], list, dict]:
    """Observations after the cue, actions and the last info of an episode in which `answer` is shown.

    actions: None for the oracle's. The arm is told something else in each episode while it waits.
    """
    rng = np.random.default_rng(len(actions or ()))
    seen, done = [], []
    with closing(SimEnv(task, image_size=32)) as env:
        env.reset(seed=SEED)
        setattr(env.task, ANSWERS[task][0], answer)
        for _ in range(env.task.cue_steps - 1):
            env.step(rng.uniform(-0.05, 0.05, 7))
        cue = env.render()
        observation, *_ = env.step(rng.uniform(-0.05, 0.05, 7))
        assert (cue != observation["image"]).any()
        oracle, latch, info = Oracle(env), GripperLatch(), {}
        for step in range(MAX_STEPS if actions is None else len(actions)):
            seen.append(observation)
            if actions is None:
                primitive = oracle.primitive()
                done.append(build_action(primitive, latch.update(primitive.gripper, env.world.opening)))
            else:
                done.append(actions[step])
            observation, _, over, _, info = env.step(done[-1])
            if over:
                break
    return seen, done, info


@pytest.mark.parametrize("task", MEMORY_TASKS)
def test_what_is_seen_after_the_cue_does_not_tell_what_it_showed(task):
    """So a policy without memory acts alike in all of them, and is right in one at most."""
    answers = ANSWERS[task][1]
    seen, actions, info = play(task, answers[0])
    assert info["success"]
    for answer in answers[1:]:
        same, _, info = play(task, answer, actions)
        assert info["lost"]  # also where the way back would have been tried next
        for one, other in zip(seen, same, strict=False):  # until one of them ends
            assert one["instruction"] == other["instruction"]
            assert np.array_equal(one["image"], other["image"]) and np.array_equal(one["proprio"], other["proprio"])
    assert MEMORY_TASKS[task].chance == 1 / len(answers)


@pytest.mark.parametrize("task", MEMORY_TASKS)
def test_every_answer_is_shown_equally_often(task):
    env, name = SimEnv(task, image_size=None), ANSWERS[task][0]
    counts: Counter = Counter()
    for seed in range(36):
        env.reset(seed=seed)
        counts[str(getattr(env.task, name))] += 1
    assert min(counts.values()) >= 6 and len(counts) == len(ANSWERS[task][1])


def test_all_does_not_mean_them():
    suite = find_suite("ours")
    assert suite.tasks == tuple(TASKS)
    suite.check(list(MEMORY_TASKS), "normal")
