"""A Policy in, a Policy out: what stands between a policy and the robot."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlm_local.policy import Policy
from vlm_local.types import Decision, Observation


class HoldPhrase:
    """Answers every decision of the inner policy for `steps` control steps, from memory in between.

    ECoT's phrase describes three control steps. `extra["held"]` counts the steps since it was made. After
    steps that something else answered, the inner policy is asked again.
    """

    def __init__(self, policy: Policy, steps: int):
        self._policy = policy
        self._steps = steps
        self._decision: Decision | None = None
        self._age = 0
        self._last_step = -1

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**self._policy.metadata, "steps_per_phrase": self._steps}

    def reset(self, seed: int) -> None:
        self._decision = None
        self._policy.reset(seed)

    def act(self, observation: Observation) -> Decision:
        follows = observation.step == self._last_step + 1
        self._last_step = observation.step
        if self._decision is not None and follows and self._age + 1 < self._steps:
            self._age += 1
            return replace(self._decision, timings_ms={}, extra={**self._decision.extra, "held": self._age})
        self._decision, self._age = None, 0  # a fault leaves nothing to answer from
        self._decision = self._policy.act(observation)
        return self._decision
