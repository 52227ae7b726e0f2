"""Wrappers that keep a robot safe: limits on every action, and a stand-still in place of a failed model's answer."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_local.actions import find_first_command
from vlm_local.embodiments import AUTO, list_embodiments, load_embodiment
from vlm_local.errors import ConfigError, EngineClosed, EngineError, RequestError, suggest
from vlm_local.policy import Policy
from vlm_local.types import Decision, Observation

logger = logging.getLogger(__name__)

COLUMNS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")  # of an action

# More than inspect-robots' WidowX driver takes in one control step is an error, not a movement.
MAX_STEP = (0.05, 0.05, 0.05, 0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Workspace:
    """A box for the measured position, metres in the robot's base frame: (low, high) an axis."""

    x_m: tuple[float, float]
    y_m: tuple[float, float]
    z_m: tuple[float, float]

    def __post_init__(self):
        for axis, (low, high) in zip("xyz", (self.x_m, self.y_m, self.z_m), strict=True):
            if not (np.isfinite([low, high]).all() and low < high):
                raise ConfigError(f"workspace: {axis} must be low:high with low below high, not {low}:{high}")

    @property
    def ranges(self) -> tuple[tuple[float, float], ...]:
        """(low, high) of x, y, z, m."""
        return self.x_m, self.y_m, self.z_m


def load_workspaces(embodiment: str | None = None) -> dict[str, Workspace]:
    """By name, of all stations that the embodiments shipped with this package know, and those of `embodiment`.

    embodiment: also of this one, a name or a file. Raises ConfigError.
    """
    names = [*list_embodiments(), *([] if embodiment in (None, AUTO) else [embodiment])]
    known = [load_embodiment(name).station_workspaces_m or {} for name in names]
    return {name: Workspace(*[(low, high) for low, high in box]) for boxes in known for name, box in boxes.items()}


def parse_workspace(text: str, embodiment: str | None = None) -> Workspace:
    """A name of `load_workspaces`, or "x0:x1,y0:y1,z0:z1" in metres. Raises ConfigError."""
    known = load_workspaces(embodiment)
    if text in known:
        return known[text]
    try:
        x, y, z = map(_parse_range, text.split(","))
        return Workspace(x, y, z)
    except ValueError:
        nearest, names = suggest(text, known), ", ".join(known)
        raise ConfigError(
            f"workspace {text!r}{nearest or ':'} expected one of {names}, or x0:x1,y0:y1,z0:z1 in metres"
        ) from None


def _parse_range(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(":"))
    return low, high


def parse_max_step(text: str) -> tuple[float, ...]:
    """ "x,y,z,roll,pitch,yaw" -> the largest step of each in metres and radians."""
    try:
        limits = tuple(float(number) for number in text.split(","))
    except ValueError:
        limits = ()
    if len(limits) != 6 or not (np.isfinite(limits).all() and min(limits) >= 0):
        raise ConfigError(f"max-step {text!r}: expected six numbers x,y,z,roll,pitch,yaw in metres and radians")
    return limits


class Guard:
    """Cuts every action to a largest step an axis and, with a workspace, to what stays inside it.

    An arm that is outside already may move back in and no further out. The target is the measured
    position plus the action, so the box holds to within one step's lag of the arm. The names of the
    axes cut are in the decision's `extra["cut"]`.
    """

    def __init__(self, policy: Policy, workspace: Workspace | None = None, max_step: tuple[float, ...] = MAX_STEP):
        """max_step: x, y, z (m), roll, pitch, yaw (rad)."""
        self._policy = policy
        self._max_step = np.array(max_step, dtype=np.float64)
        self._box = None if workspace is None else np.array(workspace.ranges)  # (3, 2)

    @property
    def metadata(self) -> Mapping[str, Any]:
        box = None if self._box is None else self._box.tolist()
        return {**self._policy.metadata, "workspace_m": box, "max_step": self._max_step.tolist()}

    def reset(self, seed: int) -> None:
        self._policy.reset(seed)

    def act(self, observation: Observation) -> Decision:
        """Raises RequestError where the workspace cannot be held for want of a position, and
        EngineError where the policy answered a number that is none.
        """
        position = None if self._box is None else _read_position(observation)
        decision = self._policy.act(observation)
        action = self._cut(np.asarray(decision.action, dtype=np.float64), position)
        changed = action != decision.action
        if not changed.any():
            return decision
        cut = [name for name, is_cut in zip(COLUMNS, changed, strict=True) if is_cut]
        return replace(decision, action=action, extra={**decision.extra, "cut": cut})

    def _cut(self, action: np.ndarray, position: np.ndarray | None) -> np.ndarray:
        """action: float64 (7,). position: float64 (3,) or None. Returns a new float64 (7,)."""
        if action.shape != (7,) or not np.isfinite(action).all():
            raise EngineError(f"expected an action of 7 finite numbers, but the policy answered {action.tolist()}")
        limits = np.append(self._max_step, np.inf)
        action = np.clip(action, -limits, limits)
        action[6] = np.clip(action[6], 0.0, 1.0)
        if position is not None and self._box is not None:
            low, high = self._box.T - position  # what is left in each direction; of the wrong sign when outside
            action[:3] = np.clip(action[:3], np.minimum(low, 0.0), np.maximum(high, 0.0))
        return action


class HoldOnFault:
    """Answers a failure of the inner policy with a stand-still; the gripper stays at `observation.gripper`.

    Why: AutoEval ends a whole evaluation when it gets anything but an array. After `max_held` failures in a row the
    failure is raised as EngineError, so that a dead model does not look like one that chooses not to move. Only an
    answer resets the count, a reset does not. Where `reset` failed (a remote policy), it is tried again before the
    next step.
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
            command = find_first_command(observation.opening)
        return Decision(np.array([0.0] * 6 + [command]), fault=reason)


def _read_position(observation: Observation) -> np.ndarray:
    proprio = observation.proprio
    if proprio is None or not np.isfinite(proprio[:3]).all():
        came = "none" if proprio is None else str(proprio[:3].tolist())
        raise RequestError(
            f"the workspace can only be held where the robot says its position, but proprio is {came}; "
            "send proprio, or serve without --workspace"
        )
    return proprio[:3]
