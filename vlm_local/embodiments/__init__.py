"""What has to be known of a robot to drive it: one JSON file each in this folder, or a file of the user's.

    load_embodiment("autoeval-widowx")
    load_embodiment("my_arm.json")

Every field of `Embodiment` but `name` stands in the file under its own name; docs/autoeval.md lists them with the
robots that are shipped, and docs/zeroshot.md describes `camera_matrix`. That one, `action_units` and
`station_workspaces_m` may be missing. No file is read before it is asked for.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import ConfigError, suggest
from vlm_local.files import read_json_object

AUTO = "auto"
BRIDGE, AUTOEVAL = "bridge-widowx", "autoeval-widowx"

COMMANDED, AS_SENT = "added to the commanded angles", "as sent"
CAMERA_WORDS = ("view", "forward", "backward", "left", "right")

_STATION_PITCH_RAD = 0.6  # from pi/2

_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Embodiment:
    """A robot as it sends its state and carries out an action. Metres, radians, base frame: +x forward, +y left.

    state_layout: name of the layout of its states in recordings (data/layouts.py), None for what is proven there.
    rotation_frame: "base", or "bridge" where rotations are measured from the gripper pointing down.
    rotation_law: COMMANDED where the robot adds an action's angles to those it was last commanded; AS_SENT where it
        turns as the action says in the Bridge frame, in which Euler angles add up.
    max_rotation_rad: the robot cuts each angle of an action to this; None where it cuts nothing.
    reset_pose: x, y, z, roll, pitch, yaw that its reset commands, in `rotation_frame`; None where it has none.
    max_step: largest step of x, y, z, roll, pitch, yaw that it shall be told.
    control_hz: control steps a second, nominal.
    gripper_reading: number of values of a state ("7", "8") -> what it reads of a closed and of an open gripper.
    gripper_command: "closed" and "open" -> the number that commands it.
    steps: fields of actions.StepTable that differ from the default, None for none.
    workspace_m: (low, high) of x, y, z; None where none is known for all stations.
    station_workspaces_m: the same by name of a station, for robots that stand at several; None for no such station.
    camera: words of the prompt about the picture, see CAMERA_WORDS.
    camera_matrix: where a point of the base frame is in the picture: "matrix" (3, 4) and "image_size" (width, height)
        as in marks.Projection, "error_px", the median distance of points it was fitted to, 0 where it is exact. None:
        the camera is not known.
    action_units: "m" and "rad" that the numbers of an action count; None for metres and radians.
    """

    name: str
    description: str
    state_layout: str | None
    rotation_frame: str
    rotation_law: str
    max_rotation_rad: float | None
    reset_pose: tuple[float, ...] | None
    max_step: tuple[float, ...]
    control_hz: float
    gripper_reading: Mapping[str, tuple[float, float]]
    gripper_command: Mapping[str, float]
    steps: Mapping[str, Any] | None
    workspace_m: tuple[tuple[float, float], ...] | None
    camera: Mapping[str, str]
    camera_matrix: Mapping[str, Any] | None = None
    action_units: Mapping[str, float] | None = None
    station_workspaces_m: Mapping[str, tuple[tuple[float, float], ...]] | None = None

    def __post_init__(self):
        self._require(self.rotation_frame in ("base", "bridge"), "rotation_frame", "'base' or 'bridge'")
        laws = (COMMANDED,) if self.rotation_frame == "base" else (AS_SENT,)
        self._require(self.rotation_law in laws, "rotation_law", f"{laws[0]!r} where the frame is so named")
        self._require_numbers("reset_pose", self.reset_pose, (6,), is_optional=self.rotation_frame == "bridge")
        self._require_numbers("max_step", self.max_step, (6,))
        self._require(min(self.max_step) >= 0, "max_step", "no negative numbers")
        for name in ("max_rotation_rad", "control_hz"):
            value = getattr(self, name)
            self._require_numbers(name, value, (), is_optional=name == "max_rotation_rad")
            self._require(value is None or value > 0, name, "more than 0")
        if self.workspace_m is not None:
            self._require_box("workspace_m", self.workspace_m)
        self._require_station_workspaces()
        self._require_mapping("gripper_reading", ("7", "8"), _is_rising, "two numbers each, closed below open")
        self._require_mapping("gripper_command", ("closed", "open"), _is_number, "numbers")
        self._require_mapping("camera", CAMERA_WORDS, lambda word: isinstance(word, str), "words")
        if self.action_units is not None:
            self._require_mapping("action_units", ("m", "rad"), lambda unit: _is_number(unit) and unit > 0, "above 0")
        self._require_camera_matrix()

    def _require(self, is_right: bool, name: str, expected: str) -> None:
        if not is_right:
            raise ConfigError(f"embodiment {self.name}: {name} must be {expected}, not {getattr(self, name)!r}")

    def _require_numbers(self, name: str, value: Any, shape: tuple[int, ...], is_optional: bool = False) -> None:
        if value is None and is_optional:
            return
        try:
            array = np.array(value)  # raises for rows of unequal lengths
            is_right = array.shape == shape and array.dtype.kind in "iuf" and bool(np.isfinite(array).all())
        except ValueError:
            is_right = False
        self._require(is_right, name, f"numbers of shape {shape}" if shape else "a number")

    def _require_station_workspaces(self) -> None:
        boxes = self.station_workspaces_m
        if boxes is None:
            return
        is_right = isinstance(boxes, dict) and all(boxes)  # no box without a name
        self._require(is_right, "station_workspaces_m", "an object of boxes by name")
        for box in boxes.values():
            self._require_box("station_workspaces_m", box)

    def _require_box(self, name: str, box: Any) -> None:
        self._require_numbers(name, box, (3, 2))
        self._require(all(low < high for low, high in box), name, "low below high in each box")

    def _require_camera_matrix(self) -> None:
        content = self.camera_matrix
        if content is None:
            return
        expected = 'an object with "matrix" (3 rows of 4 numbers), "image_size" (width, height) and "error_px"'
        is_right = isinstance(content, dict) and set(content) == {"matrix", "image_size", "error_px"}
        self._require(is_right, "camera_matrix", expected)
        for name, shape in (("matrix", (3, 4)), ("image_size", (2,)), ("error_px", ())):
            self._require_numbers("camera_matrix", content[name], shape)
        self._require(min(content["image_size"]) > 0, "camera_matrix", expected)

    def _require_mapping(
        self, name: str, keys: tuple[str, ...], is_right: Callable[[Any], bool], expected: str
    ) -> None:
        value = getattr(self, name)
        is_mapping = isinstance(value, dict) and set(value) == set(keys) and all(map(is_right, value.values()))
        self._require(is_mapping, name, f"an object with the fields {', '.join(keys)}: {expected}")


def _is_number(value: Any) -> bool:
    """Whether it is a finite one: JSON as Python reads it has NaN and Infinity, too."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rising(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(map(_is_number, pair)) and pair[0] < pair[1]


def list_embodiments() -> list[str]:
    """Names of the files that are shipped."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def find_file(name: str) -> Path:
    """By name, or the path of a JSON file itself. Raises ConfigError for a name that is none."""
    if name.endswith(".json"):
        return Path(name)
    if name == "droid":
        raise ConfigError(
            "there is no embodiment droid: its arms are driven by positions or speeds of seven joints, and a phrase "
            "moves and turns the hand; that needs inverse kinematics at the station"
        )
    if name not in (known := list_embodiments()):
        nearest = suggest(name, [AUTO, *known])
        raise ConfigError(f"embodiment must be auto, one of {', '.join(known)} or FILE.json, not {name!r}{nearest}")
    return _FOLDER / f"{name}.json"


def load_embodiment(name: str) -> Embodiment:
    """By name or file. Raises ConfigError for a file with other fields."""
    path = find_file(name)
    try:
        content = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"embodiment {path} cannot be read: {error}") from None
    expected = {field.name for field in fields(Embodiment)} - {"name"}
    content = {"camera_matrix": None, "action_units": None, "station_workspaces_m": None, **content}
    if set(content) != expected:
        raise ConfigError(
            f"embodiment {path}: expected the fields {', '.join(sorted(expected))}; "
            f"missing: {', '.join(sorted(expected - set(content))) or 'none'}, "
            f"unknown: {', '.join(sorted(set(content) - expected)) or 'none'}"
        )
    return Embodiment(name=path.stem, **content)


def looks_like_station(state: np.ndarray) -> bool:
    """Whether it is safe to believe that a state comes from an AutoEval station.

    It has 8 numbers, the seventh is 0, and the pitch is near that of a gripper pointing down in the base frame.
    SimplerEnv's Octo wrapper and Bridge data send 8 numbers, too, with a pitch near 0.
    """
    return len(state) == 8 and state[6] == 0 and abs(state[4] - np.pi / 2) < _STATION_PITCH_RAD
