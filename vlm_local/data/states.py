"""Columns of recorded states and actions -> the layouts of types.Episode.

A layout is named by the recording or by the user, or it is the only one that the numbers can have. Everything else
is refused: labels made of joint angles look like labels.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from vlm_local.data.layouts import (
    LAYOUTS,
    LIBERO,
    PADDED_POSE,
    POSE,
    StateLayout,
    check_description,
    list_layouts,
    read_names,
)
from vlm_local.data.rotations import measure_from_start
from vlm_local.data.selection import Selection
from vlm_local.embodiments import AUTO, load_embodiment, looks_like_station
from vlm_local.embodiments.rotations import base_to_bridge
from vlm_local.errors import DataError

_NUM_SAMPLES = 16  # episodes that a layout is judged by

# No gripper of an arm on a table leaves these limits in the frame of the arm's base; joint angles mostly do.
_REACH_M = (0.05, 1.5)
_LOWEST_M = -0.5
_FASTEST_M = 0.1  # a step
_MAX_ANGLE = 3.2
_GRIPPER_LIMITS = (-0.1, 1.2)
_GRIPPER_ENDS = (0.2, 0.9)  # it is closed below or open above at some time
_FINGER_LIMITS_M = (-0.005, 0.05)
_FINGERS_OPENED_M = 0.03

_FINGERS_OPEN_M = 0.08  # LIBERO's hand, from finger to finger

# Of single episodes, once the layout is known.
_MAX_POSITION_M = 3.0
_GRIPPER_RANGE = (-0.5, 1.5)


def choose_layout(
    selection: Selection,
    width: int,
    samples: Iterable[np.ndarray],
    source: str,
    names: Sequence[str] | None = None,
    description: str = "",
) -> StateLayout:
    """The layout that the user or the embodiment names, else the one that is recognised.

    Raises DataError for one that does not fit, ConfigError for an embodiment that is none.
    """
    name, frame = selection.state_layout, AUTO
    if selection.embodiment != AUTO:
        embodiment = load_embodiment(selection.embodiment)
        name, frame = name or embodiment.state_layout, embodiment.rotation_frame
    if name is None:
        return replace(recognise_layout(width, samples, source, names, description), frame=frame)
    if name not in LAYOUTS:
        raise DataError(f"there is no state layout {name!r}; there are {list_layouts()}")
    layout = LAYOUTS[name]
    if layout.width != width:
        raise DataError(f"{source}: the state has {width} numbers, but the layout {name} has {layout.width}")
    return replace(layout, frame=frame)


def recognise_layout(
    width: int, samples: Iterable[np.ndarray], source: str, names: Sequence[str] | None = None, description: str = ""
) -> StateLayout:
    """The layout of a data set whose states have `width` numbers.

    samples: states (T, width) of its episodes, read as far as needed. names: of the columns, None where the
    recording gives none. description: its own words. Raises DataError with what was seen where no layout is proven.
    """
    try:
        if names is not None:
            return read_names(names)
        check_description(description, width)
        usable = (sample for sample in samples if len(sample) and np.isfinite(sample).all())
        return _read_numbers(width, list(itertools.islice(usable, _NUM_SAMPLES)))
    except DataError as error:
        raise DataError(
            f"{source}: a state of unknown layout: {error}. If you know it, say --state-layout NAME; "
            f"there are {list_layouts()}"
        ) from None


def _read_numbers(width: int, samples: list[np.ndarray]) -> StateLayout:
    if width not in (7, 8):
        raise DataError(f"it has {width} numbers without names")
    if not samples:  # every episode is broken, and will be reported as such
        return POSE if width == 7 else PADDED_POSE
    states = np.concatenate(samples)
    if _is_quaternion(states[:, 3:7]):
        raise DataError(f"numbers 4 to 7 are a quaternion, whose order is not said{', and no gripper' * (width == 7)}")
    if width == 7:
        _check_pose(states, samples)
        return POSE
    if _are_fingers(states[:, 6:]):
        _check_position(states, samples)
        return LIBERO
    if states[:, 6].any():
        low, high = states[:, 6].min(), states[:, 6].max()
        raise DataError(
            f"8 numbers without names, of which the seventh is {low:.3g} to {high:.3g}, so it is no padding"
        )
    _check_pose(np.delete(states, 6, axis=1), samples)
    return PADDED_POSE


def _is_quaternion(numbers: np.ndarray) -> bool:
    """Four numbers of length 1 throughout (T, 4) that move; where they stand still, labels do not depend on it."""
    return bool((np.abs(np.linalg.norm(numbers, axis=1) - 1) < 0.01).all() and np.ptp(numbers[:, :3]) > 0.01)


def _are_fingers(fingers: np.ndarray) -> bool:
    """Two fingers' places (T, 2) in metres: on either side of the middle, mirrored most of the time, open at some."""
    low, high = _FINGER_LIMITS_M
    first, second = fingers[:, 0], -fingers[:, 1]
    is_inside = bool((np.minimum(first, second) > low).all() and (np.maximum(first, second) < high).all())
    return is_inside and (first + second).max() > _FINGERS_OPENED_M and bool(np.median(np.abs(first - second)) < 0.01)


def _check_position(states: np.ndarray, samples: list[np.ndarray]) -> None:
    """Refuses what x, y, z in metres cannot be. samples: the same states by episode."""
    distance = np.linalg.norm(states[:, :3], axis=1)
    low, high = distance.min(), distance.max()
    if low < _REACH_M[0] or high > _REACH_M[1] or states[:, 2].min() < _LOWEST_M:
        raise DataError(
            f"the first three numbers are {low:.2f} to {high:.2f} from the origin, the third at least "
            f"{states[:, 2].min():.2f}, which x, y, z of an arm on a table are not in metres"
        )
    moves = [np.linalg.norm(np.diff(sample[:, :3], axis=0), axis=1) for sample in samples if len(sample) > 1]
    fast = float(np.quantile(np.concatenate(moves), 0.95)) if moves else 0.0
    if fast > _FASTEST_M:
        raise DataError(f"the first three numbers move by {fast:.2f} a step, which x, y, z in metres do not")


def _check_pose(states: np.ndarray, samples: list[np.ndarray]) -> None:
    """Refuses what x, y, z, roll, pitch, yaw, gripper (T, 7) cannot be."""
    _check_position(states, samples)
    angle, gripper = np.abs(states[:, 3:6]).max(), states[:, 6]
    if angle > _MAX_ANGLE:
        raise DataError(f"an angle in the fourth to sixth number reaches {angle:.2f}, which roll, pitch, yaw do not")
    low, high = gripper.min(), gripper.max()
    closed, opened = _GRIPPER_ENDS
    if low < _GRIPPER_LIMITS[0] or high > _GRIPPER_LIMITS[1] or not (low <= closed or high >= opened):
        raise DataError(f"the last number is {low:.3g} to {high:.3g}, which a gripper's 0 (closed) to 1 (open) is not")


def convert_states(states: np.ndarray, layout: StateLayout, source: str) -> np.ndarray:
    """Recorded states (T, layout.width) -> float32 (T, 7) as types.Episode. Raises DataError for any others."""
    if states.ndim != 2 or states.shape[1] != layout.width:
        came = states.shape[1] if states.ndim == 2 else "none"
        raise DataError(
            f"{source}: a state of unknown layout: {layout.width} numbers ({layout.columns}) were expected, not {came}"
        )
    if not np.isfinite(states).all():
        raise DataError(f"{source}: the state holds numbers that are not finite, first at step {_first_bad(states)}")
    if layout.name == PADDED_POSE.name and states[:, 6].any():
        raise DataError(
            f"{source}: a state of unknown layout: the seventh of 8 numbers was expected to be 0 throughout"
        )
    if layout.fingers and np.abs(states[:, -2:]).max(initial=0) > _FINGERS_OPEN_M:
        raise DataError(f"{source}: a state of unknown layout: two fingers in metres were expected in the last columns")
    states = _convert_columns(states, layout).astype(np.float32)
    low, high = _GRIPPER_RANGE
    gripper = states[:, 6]
    if np.abs(states[:, :3]).max(initial=0) > _MAX_POSITION_M or ((gripper < low) | (gripper > high)).any():
        raise DataError(
            f"{source}: a state of unknown layout: x, y, z within {_MAX_POSITION_M} m and a gripper of 0 to 1 were "
            f"expected, but step 0 is {np.round(states[0], 3).tolist()}"
        )
    return states


def _convert_columns(states: np.ndarray, layout: StateLayout) -> np.ndarray:
    """(T, layout.width) -> (T, 7)."""
    count, to_matrix = layout.rotation
    gripper = states[:, -1:]
    if layout.fingers:
        gripper = np.clip((states[:, -2:-1] - gripper) / _FINGERS_OPEN_M, 0, 1)
    angles = states[:, 3 : 3 + count]
    if to_matrix is not None and len(states):
        angles = measure_from_start(to_matrix(angles.astype(np.float64)))
    elif len(states) and (layout.frame == "base" or (layout.frame == AUTO and looks_like_station(states[0]))):
        angles = base_to_bridge(angles.astype(np.float64))
    return np.hstack([states[:, :3], angles, gripper])


def convert_actions(actions: np.ndarray | None, layout: StateLayout = POSE) -> np.ndarray | None:
    """Recorded actions -> float32 (T, 7), or None where they are of another layout: scores leave them out.

    layout: of the states; where those are no roll, pitch, yaw, the actions' units are not Bridge's either.
    """
    if layout.rotation[1] is not None or actions is None or actions.ndim != 2 or actions.shape[1] != 7:
        return None
    # A copy: a view would keep a whole table in memory.
    return np.array(actions, dtype=np.float32) if np.isfinite(actions).all() else None


def _first_bad(states: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(states).all(axis=1)))
