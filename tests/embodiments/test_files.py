import json
from math import inf as INFINITY
from math import nan as NAN

import numpy as np
import pytest

from vlm_local.embodiments import CAMERA_WORDS, find_file, list_embodiments, load_embodiment
from vlm_local.embodiments.frame import Frame
from vlm_local.errors import ConfigError

MATRIX = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize("name", list_embodiments())
def test_every_file_that_is_shipped_loads_and_says_what_it_is(name):
    embodiment = load_embodiment(name)
    assert embodiment.name == name and embodiment.description


def test_only_a_station_is_converted():
    station = np.array([0.3, 0, 0.1, 0, 1.5, 0, 0, 0.39])
    frames = {name: Frame(name) for name in list_embodiments()}
    converts = {name for name, frame in frames.items() if not np.array_equal(frame.read(station)[3:6], station[3:6])}
    assert converts == {"autoeval-widowx"}
    assert {name for name, frame in frames.items() if frame.send(np.zeros(7)).frame == "autoeval"} == converts


def _write(folder, **changes):
    content = json.loads(find_file("autoeval-widowx").read_text())
    content = {name: value for name, value in {**content, **changes}.items() if value != "gone"}
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_a_file_of_the_users_is_read(tmp_path):
    embodiment = load_embodiment(_write(tmp_path, control_hz=10))
    assert (embodiment.name, embodiment.control_hz) == ("mine", 10)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotation_frame": "tool"},
        {"rotation_law": "as sent"},
        {"reset_pose": None},
        {"reset_pose": [0, 0, 0]},
        {"max_step": [0, 0, 0, 0, 0, -1]},
        {"max_step": "0.1"},
        {"max_step": [NAN, 0, 0, 0, 0, 0]},
        {"workspace_m": [[0, 1]]},
        {"workspace_m": [["0", 1], [0, 1], [0, 1]]},
        {"station_workspaces_m": [[0, 1]]},
        {"station_workspaces_m": {"bench": [[0, 1]]}},
        {"station_workspaces_m": {"": [[0, 1], [0, 1], [0, 1]]}},
        {"station_workspaces_m": {"bench": [[1, 0], [0, 1], [0, 1]]}},
        {"workspace_m": [[1, 0], [0, 1], [0, 1]]},
        {"max_rotation_rad": -0.1},
        {"control_hz": None},
        {"control_hz": 0},
        {"gripper_reading": {"7": [0, 1]}},
        {"gripper_reading": {"7": [0, 1], "8": [1, 0]}},
        {"gripper_reading": {"7": [0, 1], "8": [0, INFINITY]}},
        {"gripper_command": {"closed": 0, "open": True}},
        *[{"gripper_command": {"closed": 0, "open": value}} for value in (NAN, INFINITY, 10**400)],
        {"camera": {"view": "from above"}},
        {"camera": dict.fromkeys(CAMERA_WORDS, 3)},
        {"action_units": {"m": 0.05}},
        {"action_units": {"m": 0.05, "rad": 0}},
        *[{"action_units": {"m": 0.05, "rad": value}} for value in (NAN, INFINITY)],
        {"camera_matrix": {"matrix": MATRIX, "image_size": [640, 480]}},
        {"camera_matrix": {"matrix": MATRIX[:2], "image_size": [640, 480], "error_px": 0}},
        {"camera_matrix": {"matrix": MATRIX, "image_size": [640, 0], "error_px": 0}},
        {"description": "gone"},
        {"speed": 1},
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, changes):
    with pytest.raises(ConfigError, match=rf"mine.*{next(iter(changes))}"):
        load_embodiment(_write(tmp_path, **changes))


def test_droid_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"droid.*seven joints"):
        load_embodiment("droid")


@pytest.mark.parametrize("name", ["ur5", "../embodiments/simulator", "nowhere.json"])
def test_a_name_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(ConfigError, match=r"autoeval-widowx|nowhere\.json cannot be read"):
        load_embodiment(name)
