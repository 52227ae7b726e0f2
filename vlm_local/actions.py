"""Movement signs -> the 7 numbers a robot executes. Knows no model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import ConfigError
from vlm_local.files import parse_json
from vlm_local.primitives import ROTATION_DIVISOR, THRESHOLD, TRANSITIONS, is_slight
from vlm_local.types import Primitive

# A label needs strictly more than THRESHOLD over TRANSITIONS control steps. At a factor of exactly
# 1 only 27 of the 513 labelable phrases come back when executed and labelled; at 1.25 all do.
FACTOR = 1.25
STEP_M = THRESHOLD / TRANSITIONS * FACTOR
STEP_RAD = THRESHOLD * ROTATION_DIVISOR / TRANSITIONS * FACTOR

# "Slightly": the 75th percentile of a control step's size in 126 real steps of Bridge (x, y and z together).
SLIGHT_M, SLIGHT_TILT_RAD, SLIGHT_YAW_RAD = 0.007, 0.03, 0.0175

# A held object reads 0.1 to 0.85 of the gripper's range, so only nearly fully open counts as open.
OPEN_THRESHOLD = 0.95


@dataclass(frozen=True)
class StepTable:
    """Size of one control step of each axis, the joint that "tilt" turns, and the table of "slightly".

    The x, y and z sizes should be equal: under the labeller's L1 clip an axis vanishes once another
    is twice as large. slightly: of phrases with that word; None for SLIGHT_M and the like.
    """

    x_m: float = STEP_M
    y_m: float = STEP_M
    z_m: float = STEP_M
    tilt_rad: float = STEP_RAD
    yaw_rad: float = STEP_RAD
    tilt_axis: str = "pitch"
    slightly: "StepTable | None" = None

    def __post_init__(self):
        sizes = (self.x_m, self.y_m, self.z_m, self.tilt_rad, self.yaw_rad)
        if not all(isinstance(size, int | float) and np.isfinite(size) and size > 0 for size in sizes):
            raise ConfigError(f"step sizes must be positive numbers, not {sizes}")
        if self.tilt_axis not in ("roll", "pitch"):
            raise ConfigError(f"tilt_axis must be 'roll' or 'pitch', not {self.tilt_axis!r}")

    def choose(self, phrase: str) -> "StepTable":
        if not is_slight(phrase):
            return self
        return self.slightly or self.build_slight()

    def build_slight(self) -> "StepTable":
        """The table of "slightly" where a file says nothing of it."""
        return StepTable(SLIGHT_M, SLIGHT_M, SLIGHT_M, SLIGHT_TILT_RAD, SLIGHT_YAW_RAD, self.tilt_axis)


def load_step_table(path: str | Path) -> StepTable:
    """Read a JSON object with StepTable's fields; other keys at its top level are refused."""
    try:
        return build_step_table(parse_json(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        raise ConfigError(f"{path} is no step table: {error}") from error


def build_step_table(fields: Mapping[str, Any]) -> StepTable:
    """A table from its fields, as they stand in a file or in metadata; raises ConfigError for any others."""
    try:
        plain = {**fields}
        small = plain.pop("slightly", None)
        table = StepTable(**plain)
        if small is None:
            return table
        return replace(table, slightly=build_step_table({**vars(table.build_slight()), **small}))
    except TypeError as error:
        raise ConfigError(f"a step table has the fields {', '.join(vars(StepTable()))}: {error}") from error


def build_action(primitive: Primitive, gripper: float, table: StepTable = StepTable()) -> np.ndarray:
    """Signs and the latched gripper command -> float64 (7,) action as in types.Decision."""
    x, y, z, tilt, yaw, _ = primitive
    roll, pitch = (tilt, 0) if table.tilt_axis == "roll" else (0, tilt)
    signs = np.array([x, y, z, roll, pitch, yaw], dtype=np.float64)
    sizes = (table.x_m, table.y_m, table.z_m, table.tilt_rad, table.tilt_rad, table.yaw_rad)
    return np.append(signs * sizes, gripper)


def check_action(action: np.ndarray) -> np.ndarray:
    """As float64 (7,). Raises ConfigError unless it is 7 finite numbers."""
    action = np.asarray(action, np.float64)
    if action.shape != (7,) or not np.isfinite(action).all():
        raise ConfigError(f"an action is 7 finite numbers, not {action}")
    return action


def find_first_command(opening: float | None) -> float:
    """The command that leaves a gripper as it is measured (0..1): 1 open, 0 closed; open where nothing is measured."""
    return 1.0 if opening is None or opening >= OPEN_THRESHOLD else 0.0


class GripperLatch:
    """The absolute gripper command of an episode: Bridge commands a state, the words a change."""

    def __init__(self):
        self._command: float | None = None

    def reset(self) -> None:
        self._command = None

    def update(self, sign: int, opening: float | None, told: float | None = None) -> float:
        """Command for this step: 1 open, 0 closed.

        sign: the primitive's gripper sign; 0 keeps the command. opening: measured, 0..1, or None;
        only the episode's first value matters. told: the command the gripper is under, where the
        caller knows it; it counts before what this latch remembers.
        """
        if told is not None:
            self._command = told
        if self._command is None:
            self._command = find_first_command(opening)
        if sign:
            self._command = 1.0 if sign > 0 else 0.0
        return self._command
