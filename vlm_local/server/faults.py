"""What a robot is told when the model's side failed: stand still a few times, then the truth."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_local.actions import find_first_command
from vlm_local.engines.worker import EngineClosed
from vlm_local.errors import EngineError, RequestError
from vlm_local.policy import Policy
from vlm_local.types import Decision, Observation

logger = logging.getLogger(__name__)


class HoldOnFault:
    """Answers a fault of the inner policy with a stand-still, the gripper at `observation.gripper`.

    AutoEval ends a whole evaluation on anything but an array. After `max_held` faults in a row the
    fault is raised as EngineError: a dead model must not look like a shy one. A reset does not
    start the count again, only an answer does. An episode that could not be started (its policy is
    elsewhere) is started before its next step.
    """

    def __init__(self, policy: Policy, max_held: int):
        self._policy = policy
        self._max_held = max_held
        self._num_held = 0
        self._seed_due: int | None = None  # of an episode that is to be started

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._policy.metadata

    def reset(self, seed: int) -> None:
        self._seed_due = seed
        try:
            self._start_due()
        except (RequestError, EngineClosed):
            raise
        except Exception:
            logger.exception("the episode could not be started; its next step tries again")

    def _start_due(self) -> None:
        if self._seed_due is not None:
            self._policy.reset(self._seed_due)
            self._seed_due = None

    def act(self, observation: Observation) -> Decision:
        try:
            self._start_due()
            decision = self._policy.act(observation)
        except (RequestError, EngineClosed):
            raise
        except Exception as error:
            return self._hold(error, observation)
        self._num_held = 0
        return decision

    def _hold(self, error: Exception, observation: Observation) -> Decision:
        reason = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, EngineError):
            logger.exception("the policy failed")
        if self._num_held >= self._max_held:
            raise EngineError(f"{reason} (after {self._num_held} faults in a row that were held)") from error
        self._num_held += 1
        command = observation.gripper
        if command is None:
            command = find_first_command(None if observation.proprio is None else float(observation.proprio[6]))
        return Decision(np.array([0.0] * 6 + [command]), fault=reason)
