"""What is done to a policy on purpose, to see what its success rests on."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from vlm_local.actions import GripperLatch, build_action, build_step_table
from vlm_local.grammar import load_phrase_grammar
from vlm_local.lab.closed_loop.environment import State
from vlm_local.policy import Policy
from vlm_local.primitives import parse_phrase
from vlm_local.types import Decision, Observation

CONTROLS = ("none", "blank-image", "wrong-instruction")


def apply_control(control: str, state: State) -> Observation:
    """What the policy is shown under `--control`."""
    observation = state.observation
    if control == "blank-image":
        return replace(observation, image=np.zeros_like(observation.image))
    if control == "wrong-instruction":
        return replace(observation, instruction=state.wrong_instruction)
    return observation


class RandomPhrases:
    """Replaces a share of the inner policy's phrases by random ones, carried out with the same step table.

    The gripper command follows what was done, also where the phrase is the policy's own.
    """

    def __init__(self, policy: Policy, share: float):
        """share: 0 to 1. Raises ConfigError where the policy's metadata hold no valid step table."""
        self._policy, self._share = policy, share
        self._table = build_step_table(policy.metadata.get("steps") or {})
        self._phrases = load_phrase_grammar().sentences
        self._latch = GripperLatch()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**self._policy.metadata, "noise": self._share}

    def reset(self, seed: int) -> None:
        self._rng = np.random.default_rng([seed, 1])
        self._latch.reset()
        self._policy.reset(seed)

    def act(self, observation: Observation) -> Decision:
        decision = self._policy.act(observation)
        phrase, action = decision.phrase, np.array(decision.action, np.float64)
        if self._rng.random() < self._share:
            phrase = self._phrases[self._rng.integers(len(self._phrases))]
            action = build_action(parse_phrase(phrase), 0.0, self._table.choose(phrase))
        elif phrase is None:  # a foreign policy's own numbers
            return decision
        action[6] = self._latch.update(parse_phrase(phrase).gripper, observation.opening)
        return replace(decision, phrase=phrase, action=action)
