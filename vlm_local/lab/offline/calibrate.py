"""Step sizes from recorded robots: how far a labelled step moves, and what was commanded for it.

ECoT's own code collects the actions of each phrase and never uses them; here they become a step
table. Only full windows count, for a short one acts like a larger threshold.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_local.actions import StepTable, build_action
from vlm_local.errors import DataError
from vlm_local.primitives import (
    ROTATION_DIVISOR,
    THRESHOLD,
    TRANSITIONS,
    WINDOW,
    format_phrase,
    is_labelable,
    label_window,
    list_phrases,
    parse_phrase,
)
from vlm_local.types import AXES, Episode, Primitive

MIN_COUNT = 30  # fewer moving steps than this say too little about a size
_COLUMNS = (0, 1, 2, 4, 5, 6)  # of the state, for AXES; tilt is pitch unless roll gave the word
_ROLL, _TILT = 3, 3
_MAX_PHRASES = 20  # of a table in a terminal

# Where the round trip begins: rounding differs from place to place.
_STARTS = ((0, 0, 0, 0, 0, 0), (0.3, 0, 0.15, 0, 0, 0), (0.2137, -0.1093, 0.0719, 0.31, -0.73, 1.37))


@dataclass
class Moments:
    """Count, mean and standard deviation of what was added, without keeping it."""

    count: int = 0
    total: Any = 0.0
    squares: Any = 0.0

    def add(self, value: Any) -> None:
        self.count += 1
        self.total = self.total + value
        self.squares = self.squares + value**2

    @property
    def mean(self) -> Any:
        return self.total / self.count

    @property
    def spread(self) -> Any:
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))


@dataclass
class Calibration:
    """motion, action: (axis, sign) -> Moments a control step; phrases: phrase -> Moments of actions (7,).

    motion is in metres, radians and shares of the gripper's range; action is None-free only where the
    data set has actions. tilts: how many tilt labels came from "roll" and "pitch".
    """

    motion: dict[tuple[str, int], Moments] = field(default_factory=dict)
    action: dict[tuple[str, int], Moments] = field(default_factory=dict)
    phrases: dict[str, Moments] = field(default_factory=dict)
    tilts: dict[str, int] = field(default_factory=lambda: {"roll": 0, "pitch": 0})
    num_steps: int = 0

    def add(self, episode: Episode) -> None:
        for step in range(len(episode) - WINDOW + 1):
            window = episode.states[step : step + WINDOW]
            label = label_window(window)
            travelled = window[-1] - window[0]
            if np.abs(travelled[3:6]).max() > np.pi:
                continue  # an angle went past 180 degrees, and its numbers on from -180: the arm turned by much less
            motion = travelled.astype(float) / TRANSITIONS
            columns: list[int] = list(_COLUMNS)
            if label.tilt:
                by_roll = abs(travelled[_ROLL] / ROTATION_DIVISOR) > THRESHOLD
                self.tilts["roll" if by_roll else "pitch"] += 1
                columns[_TILT] = _ROLL if by_roll else columns[_TILT]
            action = None if episode.actions is None else episode.actions[step].astype(float)
            for axis, sign, column in zip(AXES, label, columns, strict=True):
                self.motion.setdefault((axis, sign), Moments()).add(motion[column])
                if action is not None:
                    self.action.setdefault((axis, sign), Moments()).add(action[column])
            if action is not None:
                self.phrases.setdefault(format_phrase(label), Moments()).add(action)
            self.num_steps += 1


def collect(episodes: Iterable[Episode]) -> Calibration:
    """Raises DataError where no episode has a full window."""
    calibration = Calibration()
    for episode in episodes:
        calibration.add(episode)
    if not calibration.num_steps:
        raise DataError(f"no episode has {WINDOW} steps, so there is no full window to measure")
    return calibration


def build_table(calibration: Calibration) -> tuple[StepTable, dict[str, int]]:
    """Mean size of labelled motion a step, and how many moving steps each size rests on.

    x, y and z share one size, as StepTable wants. A size that rests on fewer than MIN_COUNT steps
    stays the default.
    """
    sizes, counts = {}, {}
    for name, axes in (("xyz_m", ("x", "y", "z")), ("tilt_rad", ("tilt",)), ("yaw_rad", ("yaw",))):
        moving = [calibration.motion.get((axis, sign), Moments()) for axis in axes for sign in (-1, 1)]
        counts[name] = sum(moments.count for moments in moving)
        if counts[name] >= MIN_COUNT:
            total = sum(abs(moments.total) for moments in moving)  # signs do not mix within one
            sizes[name] = round(float(total / counts[name]), 5)
    xyz_m = sizes.pop("xyz_m", None)
    shared = {} if xyz_m is None else dict.fromkeys(("x_m", "y_m", "z_m"), xyz_m)
    return StepTable(**shared, **sizes), counts


def find_lost_phrases(table: StepTable) -> list[str]:
    """Labelable phrases that do not come back when carried out for TRANSITIONS steps and labelled."""
    phrases = [phrase for phrase in list_phrases() if is_labelable(parse_phrase(phrase))]
    starts = [np.array(start, dtype) for start in _STARTS for dtype in ("f4", "f8")]
    return [phrase for phrase in phrases if not all(_comes_back(phrase, table, start) for start in starts)]


def _comes_back(phrase: str, table: StepTable, start: np.ndarray) -> bool:
    primitive = parse_phrase(phrase)
    opened = float(primitive.gripper < 0)  # a gripper word that changes nothing would leave no label
    action = build_action(primitive, 1.0 - opened if primitive.gripper else opened, table)
    dtype = start.dtype
    states = np.tile(np.append(start, dtype.type(opened)), (WINDOW, 1))
    for step in range(1, WINDOW):
        states[step] = states[step - 1]
        states[step, :6] += action[:6].astype(dtype)
        states[step, 6] = action[6]
    return label_window(states) == primitive


def list_cells(calibration: Calibration) -> Iterator[dict[str, Any]]:
    """A row per axis and sign that occurs: word, count, mean and spread of motion and of action."""
    for axis in AXES:
        for sign in (-1, 0, 1):
            motion = calibration.motion.get((axis, sign))
            if motion is None:
                continue
            word = format_phrase(Primitive(**{axis: sign})) if sign else "no " + axis
            action = calibration.action.get((axis, sign))
            yield {
                "axis": axis,
                "label": word,
                "count": motion.count,
                "trusted": motion.count >= MIN_COUNT,
                "motion_mean": float(motion.mean),
                "motion_spread": float(motion.spread),
                "action_mean": None if action is None else float(action.mean),
                "action_spread": None if action is None else float(action.spread),
            }


def list_phrase_actions(calibration: Calibration) -> list[dict[str, Any]]:
    """A row per phrase that occurs, commonest first: count, and the mean commanded action (7,)."""
    ordered = sorted(calibration.phrases.items(), key=lambda item: -item[1].count)
    return [
        {
            "phrase": phrase,
            "count": moments.count,
            "trusted": moments.count >= MIN_COUNT,
            "action_mean": moments.mean.round(6).tolist(),
        }
        for phrase, moments in ordered
    ]


def format_calibration(cells: Sequence[Mapping[str, Any]], phrases: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal: `list_cells`, and the commonest of `list_phrase_actions`."""
    lines = [f"{'label':26}{'steps':>8}  {'motion a step':>20}  {'commanded':>20}"]
    for cell in cells:
        motion, action = (_format_spread(cell, name) for name in ("motion", "action"))
        few = "" if cell["trusted"] else "  too few"
        lines.append(f"{cell['label']:26}{cell['count']:8}  {motion:>20}  {action:>20}{few}")
    if phrases:
        shown = phrases[:_MAX_PHRASES]
        width = max(len(row["phrase"]) for row in shown)
        lines.append(f"\n{'phrase':{width}}{'steps':>7}  mean commanded action")
        for row in shown:
            numbers = " ".join(f"{number:+.4f}" for number in row["action_mean"])
            lines.append(f"{row['phrase']:{width}}{row['count']:7}  {numbers}{'' if row['trusted'] else '  too few'}")
        if len(phrases) > len(shown):
            lines.append(f"and {len(phrases) - len(shown)} rarer phrases")
    return "\n".join(lines)


def _format_spread(cell: Mapping[str, Any], name: str) -> str:
    mean = cell[f"{name}_mean"]
    return "not recorded" if mean is None else f"{mean:+.4f} ± {cell[f'{name}_spread']:.4f}"
