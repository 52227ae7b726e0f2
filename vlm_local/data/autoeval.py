"""Pickled trajectories: traj_*.pkl of robot_eval_logger (AutoEval's logger), and its teleop recordings.

The logger keeps an action beside the frame and proprio that follow it, and not the first observation at all; so an
action is paired here with the frame before it, and the first action and the last frame are left out. Teleop recordings
are aligned as they are.

Nothing of them is run, see data/pickles.py. Their containers may hold anything, nested and shared without end, so
what is used of them is looked at piece by piece.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np

from vlm_local.data.cache import keep_last
from vlm_local.data.images import check_image, choose_camera, decode_image, require_one_size
from vlm_local.data.layouts import LAYOUTS, PADDED_POSE, POSE, StateLayout
from vlm_local.data.pickles import MAX_BYTES, LimitedFile, Shell, load_plain
from vlm_local.data.selection import DataSet, Selection, refuse_selection, summarise_instructions
from vlm_local.data.states import convert_actions, convert_states
from vlm_local.embodiments import AUTO, AUTOEVAL, BRIDGE, load_embodiment, looks_like_station
from vlm_local.embodiments.frame import measure_opening
from vlm_local.errors import DataError, Report
from vlm_local.files import open_regular
from vlm_local.types import Episode

_WRONG_KINDS = (TypeError, ValueError, LookupError, AttributeError)  # raised by values that are not as expected
_LZ4_MAGIC = b"\x04\x22\x4d\x18"
_ALIGNED = "vlm_local.aligned"  # a field of trajectories whose frames stand beside the action that followed them
_MAX_NUMBERS = 10_000_000  # of an episode's states or actions
_POSE_LAYOUTS = {6: POSE, 7: LAYOUTS["quaternion-wxyz"]}  # of end_effector_pose, by its width, and gripper


def open_data_set(path: Path, selection: Selection, report: Report) -> DataSet:
    """Episodes of a .pkl file, or of all below a folder, one file in memory. A broken file goes to `report`."""
    refuse_selection(selection, str(path), "split", "state_layout")
    about = {"format": "AutoEval", "camera": selection.camera, "splits": [], "state_layout": "of AutoEval's logger"}
    return DataSet(about, _read_episodes(_list_files(path), selection, report))


def count_episodes(path: Path, split: str | None) -> int:
    """Files; a teleop recording may hold more than one episode."""
    return len(_list_files(path))


def _list_files(path: Path) -> list[Path]:
    """traj_2.pkl before traj_10.pkl. Raises DataError where there is none."""
    files = [path] if path.is_file() else list(path.rglob("*.pkl"))
    if not files:
        raise DataError(f"{path}: expected a .pkl file, or a folder with some in it or below, such as traj_0.pkl")
    return sorted(files, key=lambda file: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", str(file))])


def _read_episodes(files: list[Path], selection: Selection, report: Report) -> Iterator[Episode]:
    index = 0
    for path in files:
        try:
            num_trajectories = len(_load_trajectories(path))
        except DataError as error:
            report(error)
            index += 1
            continue
        for number in range(num_trajectories):
            try:
                yield _build_episode(index, path, number, selection)
            except DataError as error:
                report(error)
            except _WRONG_KINDS as error:
                report(DataError(f"{path}, episode {index}: not a trajectory ({type(error).__name__})"))
            index += 1


def _load_trajectories(path: Path) -> list[dict[str, Any]]:
    try:
        return _load_split(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except _WRONG_KINDS as error:
        raise DataError(f"{path}: not a trajectory or a list of steps ({type(error).__name__})") from None


@keep_last
def _load_split(path: Path) -> list[dict[str, Any]]:
    return _split(load_pickle(path), str(path))


def load_pickle(path: Path) -> Any:
    """What a .pkl file holds, lz4-compressed or not, in plain containers and arrays. Raises DataError."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    with file:
        limit = min(os.fstat(file.fileno()).st_size, MAX_BYTES)
        if file.read(len(_LZ4_MAGIC)) == _LZ4_MAGIC:
            file.seek(0)
            limited = LimitedFile(lz4.frame.open(file), MAX_BYTES)
        else:
            file.seek(0)
            limited = LimitedFile(file, limit)
        try:
            return load_plain(limited)
        except DataError as error:
            raise DataError(f"{path}, byte {limited.tell()}: {error}") from None
        except Exception as error:  # a damaged pickle raises nearly anything, with values that may be endless
            what = type(error).__name__
            raise DataError(f"{path}, byte {limited.tell()}: the pickle cannot be read ({what})") from None


def _split(content: Any, source: str) -> list[dict[str, Any]]:
    """What was pickled -> trajectories with language_command, obs, action and a state.

    A trajectory is such an object or dictionary; a teleop recording is a list of steps, in which
    `done` ends an episode.
    """
    if isinstance(content, Shell):
        content = vars(content)
    if isinstance(content, dict) and "obs" in content:
        return [content]
    if not isinstance(content, list) or not content:
        raise DataError(f"{source}: expected a trajectory with `obs`, or a list of steps, not {type(content).__name__}")
    if not all(isinstance(step, dict) and isinstance(step.get("observation"), dict) for step in content):
        raise DataError(
            f"{source}: the steps have no observation (recorded with --log_actions_only?), so there is no picture"
        )
    episodes: list[list[dict[str, Any]]] = [[]]
    for step in content:
        episodes[-1].append(step)
        if step.get("done"):
            episodes.append([])
    return [_join_steps(steps) for steps in episodes if steps]


def _join_steps(steps: list[dict[str, Any]]) -> dict[str, Any]:
    observations = [step["observation"] for step in steps]
    names = observations[0].keys()
    return {
        "language_command": [(step.get("metadata") or {}).get("language_instruction") for step in steps],
        "obs": {name: [observation.get(name) for observation in observations] for name in names if "image" in name},
        "action": [step.get("action") for step in steps],
        "proprio": [observation.get("state", observation.get("proprio")) for observation in observations],
        _ALIGNED: True,
    }


def _build_episode(index: int, path: Path, number: int, selection: Selection) -> Episode:
    """number: of the trajectory in its file."""
    source = f"{path}, episode {index}"
    trajectory = _load_trajectories(path)[number]
    obs = trajectory.get("obs")
    if not isinstance(obs, dict):
        raise DataError(f"{source}: obs must be a dictionary of cameras, not {type(obs).__name__}")
    camera = choose_camera([name for name in obs if isinstance(name, str)], selection.camera, source)
    states, layout = _read_states(trajectory, selection.embodiment, source)
    states = convert_states(states, layout, source)
    if len(obs[camera]) != len(states):
        raise DataError(f"{source}: {len(obs[camera])} images, but {len(states)} states")
    actions = convert_actions(_to_matrix(trajectory.get("action")), layout)

    def load_image(step: int) -> np.ndarray:
        image, at = _load_trajectories(path)[number]["obs"][camera][step], f"{source}, step {step}"
        if isinstance(image, bytes):
            return decode_image(image, at)
        if not isinstance(image, np.ndarray):
            raise DataError(f"{at}: an image was expected, not {type(image).__name__}")
        return check_image(image, at)

    said = summarise_instructions(_read_instructions(trajectory.get("language_command"), len(states), source))
    actions = actions if actions is not None and len(actions) == len(states) else None
    if _is_late(trajectory):
        states, actions = states[:-1], None if actions is None else actions[1:]
        if not len(states):
            raise DataError(f"{source}: a single step, of which the logger kept no observation")
    load_one_size = require_one_size(load_image, source)
    return Episode(index, said[0], states, actions, load_one_size, source, said[1], _read_success(trajectory))


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a rollout ended. actions: float64 (T, 7), all that the policy answered, before the station clipped any."""

    source: str
    instruction: str
    success: bool | None
    actions: np.ndarray


def read_outcomes(path: Path, report: Report) -> Iterator[Outcome]:
    """The rollouts of a .pkl file, or of all below a folder; files that hold none go to `report`.

    Raises DataError where there is no such file at all.
    """
    for file in _list_files(path):
        try:
            for trajectory in _load_trajectories(file):
                yield _read_outcome(trajectory, str(file))
        except DataError as error:
            report(error)


def _read_outcome(trajectory: dict[str, Any], source: str) -> Outcome:
    actions, said = _to_matrix(trajectory.get("action")), trajectory.get("language_command")
    if actions is None or actions.shape[1] != 7 or not np.isfinite(actions).all():
        raise DataError(f"{source}: the actions are not 7 finite numbers a step")
    return Outcome(source, said if isinstance(said, str) else "", _read_success(trajectory), actions)


def _read_success(trajectory: dict[str, Any]) -> bool | None:
    success = trajectory.get("success")
    return bool(success) if isinstance(success, bool | np.bool_) else None


def _is_late(trajectory: dict[str, Any]) -> bool:
    """Whether its frames follow its actions. The logger's later format leaves that to who calls it; there they are
    taken as they stand.
    """
    return trajectory.get("proprio") is not None and _ALIGNED not in trajectory


def _read_instructions(value: Any, num_steps: int, source: str) -> list[str]:
    """A trajectory's one instruction or none, or a teleop recording's for each step."""
    instructions = value if isinstance(value, list) and len(value) == num_steps else [value]
    texts = ["" if instruction is None else instruction for instruction in instructions]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{source}: the instruction must be text, not {type(value).__name__}")
    return [str(text).strip() for text in texts]


def _read_states(trajectory: dict[str, Any], embodiment: str, source: str) -> tuple[np.ndarray, StateLayout]:
    """(T, 7 or 8), gripper 0..1; and their layout. embodiment: as Selection's."""
    states = _to_matrix(trajectory.get("proprio"))
    if states is not None:
        told = (AUTOEVAL if looks_like_station(states[0]) else BRIDGE) if embodiment == AUTO else embodiment
        robot = load_embodiment(told)
        layout = PADDED_POSE if states.shape[1] == PADDED_POSE.width else POSE
        if layout is PADDED_POSE:
            states = np.concatenate([states[:, :7], measure_opening(robot, states[:, 7:], 8)], axis=1)
        return states, replace(layout, frame=robot.rotation_frame)
    pose, gripper = (_to_matrix(trajectory.get(name)) for name in ("end_effector_pose", "gripper"))
    if pose is None or gripper is None or len(pose) != len(gripper):
        raise DataError(
            f"{source}: neither proprio nor end_effector_pose and gripper of every step; it has "
            f"{', '.join(map(str, trajectory))[:200]}"
        )
    layout = _POSE_LAYOUTS.get(pose.shape[1])
    if layout is None or gripper.shape[1] != 1:
        raise DataError(
            f"{source}: end_effector_pose must be x, y, z and a quaternion, w first, or roll, pitch, yaw, and gripper "
            f"one number; they have {pose.shape[1]} and {gripper.shape[1]} numbers"
        )
    frame = AUTO if embodiment == AUTO else load_embodiment(embodiment).rotation_frame
    return np.concatenate([pose, gripper], axis=1), replace(layout, frame=frame)


def _to_matrix(values: Any) -> np.ndarray | None:
    """Vectors of equal length, one a step -> float (T, n); None for anything else."""
    if not isinstance(values, list | tuple | np.ndarray) or not len(values):
        return None
    width = len(values[0]) if _is_vector(values[0]) else 0
    if not 0 < width * len(values) <= _MAX_NUMBERS or not all(_is_vector(row) and len(row) == width for row in values):
        return None
    try:
        return np.array([list(row) for row in values], np.float64)
    except OverflowError:  # whole numbers beyond what a float holds
        return None


def _is_vector(row: Any) -> bool:
    """Numbers: nested lists, even small ones in a file, can stand for more than memory holds."""
    if isinstance(row, np.ndarray):
        return row.ndim == 1 and row.dtype.kind in "biuf"
    return isinstance(row, list | tuple) and all(isinstance(number, int | float) for number in row)
