"""What a model folder says, through the door that every command takes."""

import numpy as np

from vlm_local.assembly import PolicyOptions, open_policies
from vlm_local.types import AXES, Observation

PICTURES = np.random.default_rng(3).integers(0, 256, (3, 96, 96, 3), np.uint8)


def hear(folder, pictures=PICTURES, **options):
    """(phrases, marginals (n, 6, 3), metadata) of a folder for pictures; options as the flags of `serve`."""
    policies = open_policies(PolicyOptions(model=str(folder), offline=True, posterior="exact", **options))
    try:
        decisions = [policies.build(f"robot-{i}").act(Observation(each, "go")) for i, each in enumerate(pictures)]
        marginals = [[decision.marginals[axis] for axis in AXES] for decision in decisions]
        return [decision.phrase for decision in decisions], np.array(marginals), policies.metadata
    finally:
        policies.close()


def differ(folder, other, **options):
    """Largest difference between a probability of one folder and of another."""
    return float(np.abs(hear(folder, **options)[1] - hear(other)[1]).max())
