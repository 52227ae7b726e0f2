"""A small fine-tuning, how it is killed, and how its result is asked."""

import numpy as np

from vlm_local.assembly import open_policies
from vlm_local.checkpoint import open_checkpoint
from vlm_local.policy_options import PolicyOptions
from vlm_local.training.finetune import Tuning, finetune
from vlm_local.training.optimisation import Recipe
from vlm_local.types import Episode, Observation

PROMPT = "paligemma"


def record(index, direction, colour):
    """Six steps of motion along one axis, under a picture of one colour."""
    states = np.zeros((6, 7), np.float32)
    states[:, direction] = 0.02 * np.arange(6)
    image = np.full((64, 64, 3), colour, np.uint8)
    return Episode(index, "reach the block", states, None, lambda step: image, f"test {index}")


def record_another(number):
    """One for each number: pictures of this value, and states of its own."""
    episode = record(number, 0, number)
    episode.states[:, 1] += 0.001 * number
    return episode


def tune(folder, out, samples, num_steps=40, save_every=5, prompt=PROMPT, **fields):
    recipe = Recipe(num_steps, 3e-3, warmup_steps=5, log_every=10, save_every=save_every)
    checkpoint = open_checkpoint(folder)
    tuning = Tuning(recipe, **{"samples": 6, "at_once": 3, **fields})
    finetune(checkpoint, samples, tuning, prompt, 0, out, seed=0, data={"sha256": "of these samples"})


def ask(folder, colour):
    policies = open_policies(PolicyOptions(model=str(folder), offline=True))
    try:
        image = np.full((64, 64, 3), colour, np.uint8)
        return policies.build("robot").act(Observation(image, "reach the block", np.zeros(7))).phrase
    finally:
        policies.close()


class KilledAt:
    """The samples, up to a step at which somebody presses Ctrl-C."""

    def __init__(self, step, samples):
        self._step, self._samples = step, samples
        self.num_episodes = samples.num_episodes

    def draw_held_out(self, num_samples):
        return self._samples.draw_held_out(num_samples)

    def __len__(self):
        return len(self._samples)

    def draw(self, step, num_samples):
        if step == self._step:
            raise KeyboardInterrupt
        return self._samples.draw(step, num_samples)
