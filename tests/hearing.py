"""What a model folder says, through the door that every command takes."""

import functools

import numpy as np

from vlm_local.assembly import open_policies
from vlm_local.policy_options import PolicyOptions
from vlm_local.types import AXES, Observation

PICTURES = np.random.default_rng(3).integers(0, 256, (2, 64, 64, 3), np.uint8)


def hear(folder, **options):
    """(phrases, marginals (n, 6, 3), metadata) of a folder for PICTURES; options as the flags of `serve`.

    From a third of the phrases, unless another grammar is given: they take half the time.
    """
    options = {"grammar": "primitives_no_rotation", "posterior": "off"} | options
    policies = open_policies(PolicyOptions(model=str(folder), offline=True, **options))
    try:
        robots = [policies.build(f"robot-{index}", tell_all=True) for index in range(len(PICTURES))]
        decisions = [robot.act(Observation(each, "go")) for robot, each in zip(robots, PICTURES, strict=True)]
        marginals = [[decision.marginals[axis] for axis in AXES] for decision in decisions]
        return [decision.phrase for decision in decisions], np.array(marginals), policies.metadata
    finally:
        policies.close()


def write_few(folder) -> str:
    """A grammar of four phrases: the reference decoder reads the whole prompt for each of their tokens."""
    file = folder / "few.lark"
    file.write_text('start: "stop" | "move up" | "move up, close gripper" | "move left"')
    return str(file)


def differ(folder, other, **options):
    """Largest difference between a probability of one folder and of another, which no test changes later."""
    return float(np.abs(hear(folder, **options)[1] - hear_once(other)[1]).max())


@functools.cache
def hear_once(folder, **options):
    """As `hear`, of a folder that no test changes later."""
    return hear(folder, **options)
