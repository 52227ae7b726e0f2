"""Columns of recorded states and actions -> the layouts of types.Episode."""

from collections.abc import Sequence

import numpy as np

from vlm_local.errors import DataError

LAYOUT = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
PADDED_LAYOUT = ("x", "y", "z", "roll", "pitch", "yaw", "pad", "gripper")  # LeRobot's port of Bridge
_PADDED_COLUMNS = (0, 1, 2, 3, 4, 5, 7)

# Wider than any arm's reach and any recorded gripper, narrower than most joint angles.
_MAX_POSITION_M = 3.0
_GRIPPER_RANGE = (-0.5, 1.5)


def convert_states(states: np.ndarray, source: str, names: Sequence[str] | None = None) -> np.ndarray:
    """Recorded states (T, 7 or 8) -> float32 (T, 7) as types.Episode.

    names: of the columns, where the recording gives them. Raises DataError for any other layout; with
    no names, for values that no such state can have.
    """
    layouts = {7: LAYOUT, 8: PADDED_LAYOUT}
    width = states.shape[1] if states.ndim == 2 else 0
    named = None if names is None else tuple(name.lower() for name in names)
    if width not in layouts or named not in (None, layouts[width]):
        came = f"{width} numbers" if names is None else f"({', '.join(names)})"
        raise DataError(
            f"{source}: a state of unknown layout, {came}; expected ({', '.join(LAYOUT)}) "
            f"or ({', '.join(PADDED_LAYOUT)})"
        )
    states = np.asarray(states if width == 7 else states[:, _PADDED_COLUMNS], dtype=np.float32)
    if not np.isfinite(states).all():
        raise DataError(f"{source}: the state holds numbers that are not finite, first at step {_first_bad(states)}")
    low, high = _GRIPPER_RANGE
    gripper = states[:, 6]
    if np.abs(states[:, :3]).max(initial=0) > _MAX_POSITION_M or ((gripper < low) | (gripper > high)).any():
        raise DataError(
            f"{source}: a state of unknown layout: x, y, z within {_MAX_POSITION_M} m and a gripper of 0 to 1 were "
            f"expected, but step 0 is {np.round(states[0], 3).tolist()}"
        )
    return states


def convert_actions(actions: np.ndarray | None) -> np.ndarray | None:
    """Recorded actions -> float32 (T, 7), or None where they are of another layout: scores leave them out."""
    if actions is None or actions.ndim != 2 or actions.shape[1] != 7 or not np.isfinite(actions).all():
        return None
    return np.asarray(actions, dtype=np.float32)


def _first_bad(states: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(states).all(axis=1)))
