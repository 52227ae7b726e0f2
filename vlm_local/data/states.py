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
from vlm_local.embodiments.rotations import base_to_bridge, euler_to_matrix
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

# Limits of units, once the layout is known: millimetres, degrees and percent lie beyond them.
_MAX_POSITION_M = 3.0
_MAX_ANGLE_RAD = 2 * np.pi
_GRIPPER_RANGE = (-0.5, 1.5)
_MAX_OFF_UNIT = 0.05
_USUAL = 0.95  # of a data set's steps; the others cost their episode, not the data set
_WIDEST_M, _GRIPPER_MOVED_M = 0.12, 0.015

_NEAR_LOCK_RAD = 0.6
_MAX_ROLL_RAD = 3 * np.pi / 4  # at an episode's start: beyond it, the gripper of Bridge's frame would point up


def choose_layout(
    selection: Selection,
    width: int,
    samples: Iterable[np.ndarray],
    source: str,
    names: Sequence[str] = (),
    description: str = "",
) -> StateLayout:
    """The layout that the user or the embodiment names, else the one that is proven.

    samples: states (T, width) of the data set's episodes, read as far as needed. names: of the columns; fewer or more
    than `width` are words like `description`, the recording's own. Raises DataError with what was seen where no layout
    is proven, and for numbers of other units or of an unknown frame, whoever named the layout; ConfigError for an
    embodiment that is none.
    """
    name, frame = selection.state_layout, AUTO
    if selection.embodiment != AUTO:
        embodiment = load_embodiment(selection.embodiment)
        name, frame = name or embodiment.state_layout, embodiment.rotation_frame
    usable = (
        sample for sample in samples if sample.shape[1:] == (width,) and np.isfinite(sample).all() and len(sample)
    )
    sampled = list(itertools.islice(usable, _NUM_SAMPLES))
    try:
        layout = replace(_find_layout(name, width, sampled, names, description), frame=frame)
        if sampled:
            _check_units(np.concatenate(sampled), layout, _USUAL)
            layout = replace(layout, frame=_find_frame(np.array([sample[0] for sample in sampled]), layout))
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    return layout


def _find_layout(
    name: str | None, width: int, samples: list[np.ndarray], names: Sequence[str], description: str
) -> StateLayout:
    """name: that the user or the embodiment says, or None."""
    if name is not None:
        if name not in LAYOUTS:
            raise DataError(f"there is no state layout {name!r}; there are {list_layouts()}")
        if LAYOUTS[name].width != width:
            raise DataError(f"the state has {width} numbers, but the layout {name} has {LAYOUTS[name].width}")
        return LAYOUTS[name]
    try:
        if len(names) == width:
            layout = read_names(names)
        else:
            check_description(" ".join((description, *names)), width)
            layout = _read_numbers(width, samples)
        _check_gripper_unit(samples, layout)
        return layout
    except DataError as error:
        fitting = list_layouts(width)
        known = f"If you know it, say --state-layout NAME; there are {fitting}" if fitting else f"No layout has {width}"
        raise DataError(f"a state of unknown layout: {error}. {known}") from None


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
    behind = _pick(states[:, 0], 1 - _USUAL)
    if behind <= 0:
        raise DataError(
            f"the first number goes down to {behind:.2f}, but x, forward from the arm's base, is positive; the first "
            "joint's angle takes both signs"
        )
    angle, gripper = np.abs(states[:, 3:6]).max(), states[:, 6]
    if angle > _MAX_ANGLE:
        raise DataError(f"an angle in the fourth to sixth number reaches {angle:.2f}, which roll, pitch, yaw do not")
    low, high = gripper.min(), gripper.max()
    closed, opened = _GRIPPER_ENDS
    if low < _GRIPPER_LIMITS[0] or high > _GRIPPER_LIMITS[1] or not (low <= closed or high >= opened):
        raise DataError(f"the last number is {low:.3g} to {high:.3g}, which a gripper's 0 (closed) to 1 (open) is not")


def _check_gripper_unit(samples: list[np.ndarray], layout: StateLayout) -> None:
    """Refuses a gripper that moves, but never further than a width in metres: its words would be those of large
    movements alone.
    """
    gripper = np.concatenate([sample[:, -1] for sample in samples] or [np.zeros(1)])
    if not layout.fingers and gripper.max() < _WIDEST_M and np.ptp(gripper) > _GRIPPER_MOVED_M:
        raise DataError(
            f"the gripper's number goes from {gripper.min():.3g} to {gripper.max():.3g}, as an opening in metres does; "
            "0 (closed) to 1 (open) was expected"
        )


def _pick(values: np.ndarray, share: float) -> float:
    """The number that this share of `values` (n,) does not exceed; np.quantile takes sixty times as long."""
    return float(np.sort(values)[round(share * (len(values) - 1))])


def _check_units(states: np.ndarray, layout: StateLayout, share: float = 1.0) -> None:
    """Refuses states (T, layout.width) that are not in metres, radians and, of a gripper, 0 to 1.

    share: of the steps that are looked at, beginning with the smallest numbers.
    """
    far = _pick(np.abs(states[:, :3]).max(axis=1), share)
    if far > _MAX_POSITION_M:
        raise DataError(f"x, y, z in metres were expected, within {_MAX_POSITION_M} m; they reach {far:.4g}")
    rotations = states[:, 3 : 3 + layout.rotation[0]]
    if layout.is_quaternion:
        off = _pick(np.abs(np.linalg.norm(rotations, axis=1) - 1), share)
        if off > _MAX_OFF_UNIT:
            raise DataError(f"quaternions of length 1 were expected in numbers 4 to 7; lengths are up to {off:.2g} off")
    else:
        angle = _pick(np.abs(rotations).max(axis=1), share)
        if angle > _MAX_ANGLE_RAD:
            raise DataError(f"a rotation in radians was expected in numbers 4 to 6, but they reach {angle:.4g}")
    low, high = _pick(states[:, -1], 1 - share), _pick(states[:, -1], share)
    if not layout.fingers and (low < _GRIPPER_RANGE[0] or high > _GRIPPER_RANGE[1]):
        raise DataError(f"a gripper of 0 (closed) to 1 (open) was expected; it reads {low:.3g} to {high:.3g}")


def _find_frame(first: np.ndarray, layout: StateLayout) -> str:
    """The frame of a data set's roll, pitch, yaw where nothing says it: a station's, or AUTO.

    first: first states of the episodes (n, layout.width); most of them count, since a single one can begin anyhow.
    Raises DataError where they begin near a pitch of 90 degrees, at which roll and yaw jump, and are no station's.
    """
    if layout.frame != AUTO or layout.rotation[1] is not None:
        return layout.frame
    if np.mean([looks_like_station(state) for state in first]) > 0.5:
        return "base"
    pitch = float(np.median(np.abs(first[:, 4])))
    if abs(pitch - np.pi / 2) < _NEAR_LOCK_RAD:
        raise DataError(
            f"episodes begin at a pitch near 90 degrees ({pitch:.2f} rad), and nothing says from where it is measured; "
            f"say --state-layout {layout.name} --embodiment autoeval-widowx for the base frame of a WidowX, or "
            "bridge-widowx to take the angles as they are"
        )
    return AUTO


def convert_states(states: np.ndarray, layout: StateLayout, source: str) -> np.ndarray:
    """Recorded states (T, layout.width) -> float32 (T, 7) as types.Episode. Raises DataError for any others."""
    if states.ndim != 2 or states.shape[1] != layout.width:
        came = states.shape[1] if states.ndim == 2 else "none"
        raise DataError(
            f"{source}: a state of unknown layout: {layout.width} numbers ({layout.columns}) were expected, not {came}"
        )
    if not len(states):
        raise DataError(f"{source}: the episode has no steps")
    is_finite = np.isfinite(states).all(axis=1)
    if not is_finite.all():
        raise DataError(f"{source}: the state holds numbers that are not finite, first at step {is_finite.argmin()}")
    if layout.name == PADDED_POSE.name and states[:, 6].any():
        raise DataError(
            f"{source}: a state of unknown layout: the seventh of 8 numbers was expected to be 0 throughout"
        )
    if layout.fingers and np.abs(states[:, -2:]).max() > _FINGERS_OPEN_M:
        raise DataError(f"{source}: a state of unknown layout: two fingers in metres were expected in the last columns")
    try:
        _check_units(states, layout)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    return _convert_columns(states, layout).astype(np.float32)


def _convert_columns(states: np.ndarray, layout: StateLayout) -> np.ndarray:
    """(T, layout.width) -> (T, 7)."""
    count, to_matrix = layout.rotation
    gripper = states[:, -1:]
    if layout.fingers:
        gripper = np.clip((states[:, -2:-1] - gripper) / _FINGERS_OPEN_M, 0, 1)
    angles = states[:, 3 : 3 + count].astype(np.float64)
    if to_matrix is not None:
        angles = measure_from_start(to_matrix(angles))
    elif layout.frame == "base":
        angles = base_to_bridge(angles)
    elif layout.frame == AUTO and abs(angles[0, 0]) > _MAX_ROLL_RAD:
        angles = measure_from_start(euler_to_matrix(angles))
    return np.hstack([states[:, :3], angles, gripper])


def convert_actions(actions: np.ndarray | None, layout: StateLayout) -> np.ndarray | None:
    """Recorded actions -> float32 (T, 7), or None where they are of another layout: scores leave them out.

    layout: of the states; where those are no roll, pitch, yaw, the actions' units are not Bridge's either.
    """
    if layout.rotation[1] is not None or actions is None or actions.ndim != 2 or actions.shape[1] != 7:
        return None
    # A copy: a view would keep a whole table in memory.
    return np.array(actions, dtype=np.float32) if np.isfinite(actions).all() else None
