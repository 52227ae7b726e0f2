"""Layouts of recorded states: named, proven by the numbers, or refused; seen through `label` and the readers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests import recordings
from vlm_local.cli import main
from vlm_local.data import Selection, open_data_set
from vlm_local.data.layouts import LAYOUTS
from vlm_local.data.states import choose_layout, convert_actions, convert_states
from vlm_local.embodiments import AUTO
from vlm_local.embodiments.rotations import base_to_bridge
from vlm_local.errors import DataError
from vlm_local.primitives import format_phrase, label_episode

T = 40
STEPS = np.arange(T)
OPEN = (STEPS // 10) % 2 == 0
DOWN = np.pi  # LIBERO's axis times angle of a gripper that points down: (pi, 0, 0)


def _columns(*columns):
    return np.column_stack([np.broadcast_to(column, T) for column in columns]).astype(np.float32)


FINGERS = (np.where(OPEN, 0.04, 0.01), np.where(OPEN, -0.04, -0.01))
LIBERO = _columns(-0.05 + 0.02 * STEPS, 0.1, 1.0, DOWN, 0, 0, *FINGERS)
FRANKA = _columns(0.02 * STEPS, -0.78, 0, -2.36, 0, 1.57, 0.78, OPEN)
FRANKA_WITHOUT_GRIPPER = FRANKA[:, :7]
UR5 = _columns(0.02 * STEPS, -1.57, 1.57, -1.57, -1.57, 0, OPEN)
QUATERNION = _columns(
    0.3 + 0.02 * STEPS, 0, 0.2, *(np.sin(STEPS / 40) * axis for axis in (0, 0, 1)), np.cos(STEPS / 40), OPEN
)
FRANKA_AT_15_HZ = _columns(  # seven joints about its usual pose, slow enough to be metres; the last like a gripper
    0.3 * np.sin(STEPS / 8), -0.78, 0, -2.36, 0, 1.57, 0.78 + 0.2 * np.cos(STEPS / 8)
)
NARROW = _columns(0.3, 0.01 * STEPS, 0.2, 0, 0, 0, 0.5)  # the last number is no gripper's


def _write(folder, states, names=None, description=""):
    """RLDS, or LeRobot where columns are to be named."""
    if names is None:
        recordings.write_rlds(folder, [recordings.make_rlds_record(states)])
        recordings.write_features(folder, states.shape[1], description=description)
    else:
        recordings.write_lerobot(folder, [states], images="image", names=names, state_width=states.shape[1])
    return folder


def _read(folder, layout=None):
    data = open_data_set(folder, Selection(state_layout=layout))
    (episode,) = data.episodes
    return data.about["state_layout"], episode


def _say(states):
    return [format_phrase(label) for label in label_episode(states)[0]]


@pytest.mark.parametrize("names", [None, ["state"] * 8, {"motors": [f"motor_{number}" for number in range(8)]}])
def test_two_fingers_are_a_gripper(tmp_path, names):
    layout, episode = _read(_write(tmp_path / "data", LIBERO, names))
    assert layout == "libero"
    said = _say(episode.states)
    assert (
        sum("close gripper" in phrase for phrase in said) == 6 and sum("open gripper" in phrase for phrase in said) == 3
    )
    assert {phrase.partition(",")[0] for phrase in said[:-2]} == {"move forward"}
    np.testing.assert_allclose(episode.states[:, 6], np.where(OPEN, 1, 0.25))  # of 8 cm
    assert episode.actions is None  # in the simulator's units


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        ("x y z roll pitch yaw pad gripper", "pose-pad"),
        ("eef_x eef_y eef_z eef_roll eef_pitch eef_yaw pad gripper_position", "pose-pad"),
        ("x y z axis_angle1 axis_angle2 axis_angle3 gripper gripper", "libero"),
        ("x y z axis_angle1 axis_angle2 axis_angle3 left_finger right_finger", "libero"),
        ("x y z roll pitch yaw gripper gripper", "libero"),
        ("x y z rx ry rz rw gripper", "quaternion-xyzw"),
        ("x y z qw qx qy qz gripper", "quaternion-wxyz"),
    ],
)
def test_a_layout_is_taken_by_its_names(tmp_path, names, layout):
    padded = np.insert(recordings.make_states(T), 6, 0, axis=1)
    states = LIBERO if layout == "libero" else QUATERNION if layout.startswith("q") else padded
    assert _read(_write(tmp_path / "data", states, names.split()))[0] == layout


@pytest.mark.parametrize(
    ("states", "names", "description", "says"),
    [
        (FRANKA, None, "", "the seventh is 0.78 to 0.78, so it is no padding"),
        (FRANKA, [f"motor_{number}" for number in range(8)], "", "the seventh is 0.78"),
        (FRANKA_WITHOUT_GRIPPER, None, "", "the last number is 0.78 to 0.78, which a gripper's"),
        (FRANKA_AT_15_HZ, None, "", "the first number goes down to -0.3"),
        (UR5, None, "", r"the first three numbers are 2.22 to .* from the origin"),
        (QUATERNION, None, "", "numbers 4 to 7 are a quaternion, whose order is not said"),
        (NARROW, None, "", "the last number is 0.5 to 0.5"),
        (np.hstack([FRANKA, FRANKA]), None, "", "it has 16 numbers without names"),
        (10 * recordings.make_states(T), None, "", "from the origin"),
        (recordings.make_states(T), None, "6x robot joint angles, 1x gripper", "its description is '6x robot joint"),
        (recordings.make_states(T), list("abcdefg"), "", "its columns are a, b, c"),
        (recordings.make_states(T), ["x", "y", "z", "roll", "pitch", "yaw", "gripper_closed"], "", "gripper_closed"),
    ],
)
def test_what_is_no_pose_is_refused_with_what_was_seen(tmp_path, capsys, states, names, description, says):
    folder = _write(tmp_path / "data", states.astype(np.float32), names, description)
    with pytest.raises(DataError, match=says):
        open_data_set(folder)
    assert main(["label", str(folder), "--out", str(tmp_path / "rows.jsonl")]) == 2
    advice = {7: "there are pose (x y z roll pitch yaw gripper), axis-angle", 8: "there are pose-pad (x y z"}
    assert advice.get(states.shape[1], "without names. No layout has 16") in capsys.readouterr().err
    assert not list(tmp_path.glob("rows.jsonl*"))


PROVEN = _columns(0.3, 0.01 * STEPS, 0.2, 0, 0, 0, OPEN)
PADDED = np.insert(PROVEN, 6, 0, axis=1)
STILL_LIBERO = _columns(0.3, 0.1, 0.2, DOWN, 0, 0, *FINGERS)


def _with(states, *columns_values):
    """A copy with other columns: pairs of a column and its value or values."""
    states = states.copy()
    for column, values in columns_values:
        states[:, column] = values
    return states


@pytest.mark.parametrize(
    ("build", "inside", "outside", "says"),
    [
        (lambda value: _with(PROVEN, (0, value), (1, 0), (2, 0)), (0.06, 1.45), (0.04, 1.55), "from the origin"),
        (lambda value: _with(PROVEN, (2, value)), (-0.49,), (-0.51,), "the third at least -0.51"),
        (lambda value: _with(PROVEN, (1, value * (STEPS % 2))), (0.09,), (0.11,), "move by 0.11 a step"),
        (lambda value: _with(PROVEN, (3, value)), (3.15, -3.15), (3.25, -3.25), "reaches 3.25"),
        (lambda value: _with(PROVEN, (5, value)), (3.15, -3.15), (3.25, -3.25), "reaches 3.25"),
        (lambda value: _with(PROVEN, (6, np.where(OPEN, 1, value))), (-0.09,), (-0.11,), "last number is -0.11 to 1"),
        (lambda value: _with(PROVEN, (6, np.where(OPEN, value, 0))), (1.1,), (1.3,), "last number is 0 to 1.3"),
        (lambda value: _with(PROVEN, (6, np.where(OPEN, 0.5, value))), (0.19,), (0.21,), "last number is 0.21 to 0.5"),
        (lambda value: _with(PROVEN, (6, np.where(OPEN, value, 0.5))), (0.91,), (0.89,), "last number is 0.5 to 0.89"),
        (lambda value: _with(PROVEN, (6, np.where(OPEN, value, 0))), (0.13,), (0.11,), "an opening in metres"),
        (lambda value: _with(PROVEN, (6, np.where(OPEN, value, 0))), (0.014,), (0.016,), "an opening in metres"),
        (lambda value: _with(PADDED, (2, value)), (-0.49,), (-0.51,), "the third at least -0.51"),
        (lambda value: _with(PROVEN, (5, value * OPEN), (6, 1)), (0.009,), (0.011,), "a quaternion.*, and no gripper"),
        (lambda value: _with(STILL_LIBERO, (2, value)), (-0.49,), (-0.51,), "the third at least -0.51"),
        (
            lambda value: _with(STILL_LIBERO, (6, value * OPEN), (7, -value * OPEN)),
            (0.049,),
            (0.051,),
            "the seventh is 0 to",
        ),
        (lambda value: _with(STILL_LIBERO, (6, 0.03), (7, value - 0.03)), (0.009,), (0.011,), "the seventh is"),
        (lambda value: _with(STILL_LIBERO, (7, np.where(OPEN, -0.04, value))), (0.004,), (0.006,), "the seventh is"),
        (lambda value: _with(STILL_LIBERO, (6, value), (7, -value)), (0.016,), (0.014,), "the seventh is"),
    ],
)
def test_numbers_alone_prove_a_layout_within_limits(build, inside, outside, says):
    for value in inside:
        states = build(value)
        assert choose_layout(Selection(), states.shape[1], [states], "data").name in ("pose", "pose-pad", "libero")
    for value in outside:
        states = build(value)
        with pytest.raises(DataError, match=says):
            choose_layout(Selection(), states.shape[1], [states], "data")


@pytest.mark.parametrize(
    ("layout", "build", "inside", "outside", "says"),
    [
        ("pose", lambda value: _with(PROVEN, (0, value)), (2.9, -2.9), (3.1, -3.1), "they reach 3.1"),
        ("pose", lambda value: _with(PROVEN, (5, value)), (6.2, -6.2), (6.4, -6.4), "they reach 6.4"),
        ("pose", lambda value: _with(PROVEN, (6, np.where(OPEN, 1, value))), (-0.45,), (-0.55,), "reads -0.55 to 1"),
        ("pose", lambda value: _with(PROVEN, (6, np.where(OPEN, value, 0))), (1.45,), (1.55,), "reads 0 to 1.55"),
        ("pose", lambda value: _with(PROVEN, (4, value)), (0.95, 2.2, -0.95), (1.0, 2.1, -1.0), "near 90 degrees"),
        ("axis-angle", lambda value: _with(PROVEN, (4, value)), (1.57, 6.2), (6.4,), "they reach 6.4"),  # no pitch
        ("quaternion-xyzw", lambda value: _with(QUATERNION, (5, 0), (6, value)), (0.96, 1.04), (0.94, 1.06), "off"),
    ],
)
def test_a_named_layout_has_limits_of_units(layout, build, inside, outside, says):
    selection = Selection(state_layout=layout)
    for value in inside:
        states = build(value)
        convert_states(states, choose_layout(selection, states.shape[1], [states], "data"), "data")
    for value in outside:
        states = build(value)
        with pytest.raises(DataError, match=says):
            choose_layout(selection, states.shape[1], [states], "data")


def test_broken_episodes_say_nothing_about_the_layout():
    broken = [np.full((T, 7), np.nan, np.float32), FRANKA, np.zeros((0, 7), np.float32)]
    assert choose_layout(Selection(), 7, [*broken, PROVEN], "data").name == "pose"
    assert choose_layout(Selection(), 7, broken, "data").name == "pose"  # each is refused by itself then


def test_an_embodiment_names_the_layout_unless_the_user_does(tmp_path):
    closed = _with(STILL_LIBERO, (6, 0.001), (7, -0.001))  # which proves no fingers
    with pytest.raises(DataError, match="unknown layout"):
        open_data_set(_write(tmp_path / "closed", closed))
    for states, layout, expected in ((closed, None, "libero"), (QUATERNION, "quaternion-xyzw", "quaternion-xyzw")):
        selection = Selection(state_layout=layout, embodiment="libero")
        assert open_data_set(_write(tmp_path / expected, states), selection).about["state_layout"] == expected


@pytest.mark.parametrize(
    ("roll", "frame", "is_kept"),
    [(2.3, AUTO, True), (-2.3, AUTO, True), (2.4, AUTO, False), (-2.4, AUTO, False), (2.4, "bridge", True)],
)
def test_an_episode_that_begins_with_a_roll_beyond_135_degrees_is_not_in_bridges_frame(roll, frame, is_kept):
    states = _with(PROVEN, (3, np.where(STEPS == 0, roll, 0)))
    rolls = convert_states(states, replace(LAYOUTS["pose"], frame=frame), "data")[:, 3]
    assert (rolls[0] == pytest.approx(roll) and not rolls[1:].any()) == is_kept


@pytest.mark.parametrize(
    ("states", "says"),
    [
        (PADDED, "7 numbers .* were expected, not 8"),
        (PROVEN[0], "7 numbers .* were expected, not none"),
        (PROVEN[:0], "no steps"),
        (_with(PROVEN, (1, np.where(STEPS < 3, 0, np.nan))), "first at step 3"),
    ],
)
def test_states_that_are_none_of_a_layout_are_refused(states, says):
    with pytest.raises(DataError, match=f"data: .*{says}"):
        convert_states(states, LAYOUTS["pose"], "data")


def test_actions_are_those_of_bridge_or_left_out():
    actions = np.ones((T, 7))
    converted = convert_actions(actions, LAYOUTS["pose"])
    assert converted.dtype == np.float32 and converted.base is None and converted.all()
    for other in (None, actions[:, :6], actions[0], np.ones((T, 7, 1)), np.full((T, 7), np.nan)):
        assert convert_actions(other, LAYOUTS["pose"]) is None
    assert convert_actions(actions, LAYOUTS["libero"]) is None


JOINTS = [f"joint_{number}" for number in range(7)]


@pytest.mark.parametrize(
    "names",
    [
        {name: column for column, name in enumerate(JOINTS)},
        [JOINTS],
        {"motors": {name: column for column, name in enumerate(JOINTS)}},
        {"arm": JOINTS[:6], "gripper": {"joint_6": 0}},
        JOINTS[:6],  # not one for each number, but words
    ],
)
def test_joint_angles_are_refused_however_their_names_are_written(tmp_path, names):
    """Numbers that could be a pose: the names alone tell."""
    with pytest.raises(DataError, match="joint_0"):
        open_data_set(_write(tmp_path / "data", recordings.make_states(T), names))


def test_names_may_be_columns_of_a_dictionary_in_any_order(tmp_path):
    columns = {"gripper": 6, "x": 0, "y": 1, "z": 2, "roll": 3, "pitch": 4, "yaw": 5}
    for names in (columns, {"axes": None}, ["proprio"]):
        folder = _write(tmp_path / str(len(names)) / str(type(names)), recordings.make_states(T), names)
        assert _read(folder)[0] == "pose"


POSE_NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
QUATERNION_NAMES = ["x", "y", "z", "qx", "qy", "qz", "qw", "gripper"]
MILLIMETRES = recordings.make_states(T) * [1000, 1000, 1000, 1, 1, 1, 1]
DEGREES = recordings.make_states(T) * [1, 1, 1, *[180 / np.pi] * 3, 1]


@pytest.mark.parametrize("is_told", [False, True])
@pytest.mark.parametrize(
    ("states", "names", "layout", "says"),
    [
        (DEGREES, POSE_NAMES, "pose", "a rotation in radians was expected in numbers 4 to 6, but they reach 114.6"),
        (MILLIMETRES, POSE_NAMES, "pose", r"x, y, z in metres were expected, within 3\.0 m; they reach \d\d\d"),
        (recordings.make_states(T) * [1, 1, 1, 1, 1, 1, 100], POSE_NAMES, "pose", "it reads 0 to 100"),
        (QUATERNION * [1, 1, 1, 2, 2, 2, 2, 1], QUATERNION_NAMES, "quaternion-xyzw", "lengths are up to 1 off"),
        (QUATERNION * [1, 1, 1, 0, 0, 0, 0, 1], QUATERNION_NAMES, "quaternion-xyzw", "lengths are up to 1 off"),
    ],
)
def test_names_say_no_units_so_the_numbers_are_looked_at(tmp_path, states, names, layout, says, is_told):
    folder = _write(tmp_path / "data", states.astype(np.float32), names)
    with pytest.raises(DataError, match=says):
        open_data_set(folder, Selection(state_layout=layout if is_told else None))


def test_an_episode_of_other_units_is_left_out(tmp_path):
    others = [recordings.make_states(T, seed) for seed in range(30)]
    recordings.write_lerobot(
        tmp_path, [*others, DEGREES.astype(np.float32)], images="image", names=POSE_NAMES, state_width=7
    )
    problems = []
    assert len(list(open_data_set(tmp_path, report=problems.append).episodes)) == 30
    assert len(problems) == 1 and "episode 30: a rotation in radians was expected" in str(problems[0])


def test_a_gripper_in_metres_is_refused_unless_the_user_knows_better(tmp_path):
    metres = (recordings.make_states(T) * [1, 1, 1, 1, 1, 1, 0.08]).astype(np.float32)
    for name, names in (("named", POSE_NAMES), ("numbers", None)):
        folder = _write(tmp_path / name, metres, names)
        with pytest.raises(DataError, match=r"goes from 0 to 0\.08, as an opening in metres does"):
            open_data_set(folder)
        assert _read(folder, "pose")[0] == "pose"


def test_a_roll_near_180_degrees_is_measured_from_the_gripper_pointing_down(tmp_path):
    """As Franka, UR and xArm arms say it: held still it jumps between pi and -pi, which is no tilt."""
    still = np.pi + np.random.default_rng(0).normal(0, 0.01, T)
    folder = _write(tmp_path / "still", _columns(0.3, 0, 0.2, (still + np.pi) % (2 * np.pi) - np.pi, 0, 0, 1))
    _, episode = _read(folder)
    np.testing.assert_allclose(episode.states[:, 3], still - np.pi, atol=1e-5)
    assert set(_say(episode.states)) == {"stop"}
    turning = _columns(0.3, 0, 0.2, -np.pi, 0.11 * STEPS / 4, (0.11 * STEPS + np.pi) % (2 * np.pi) - np.pi, 1)
    _, episode = _read(_write(tmp_path / "turning", turning))
    np.testing.assert_allclose(episode.states[0, 3:6], 0, atol=1e-5)
    assert _say(episode.states)[:3] == ["rotate counterclockwise"] * 3


@pytest.mark.parametrize(("num_level", "num_down"), [(1, 4), (4, 1)])
def test_the_frame_of_a_station_is_that_of_most_episodes(tmp_path, num_level, num_down):
    """A Bridge episode may begin with a level gripper, one of a station with one that is tilted far."""
    turning = [_columns(0.3, 0, 0.2, 0, 0.11 * STEPS / 4 + start, 0, 0, 1) for start in (np.pi / 2, 0.3)]
    episodes = [turning[0]] * num_level + [turning[1]] * num_down
    recordings.write_lerobot(tmp_path, episodes, images="image", names=[*POSE_NAMES[:6], "pad", "gripper"])
    read = list(open_data_set(tmp_path).episodes)
    for episode, states in zip(read, episodes, strict=True):
        angles = states[:, 3:6] if num_down > num_level else base_to_bridge(states[:, 3:6].astype(float))
        np.testing.assert_allclose(episode.states[:, 3:6], angles, atol=1e-5)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_angles_near_the_lock_need_a_frame(tmp_path, pitch):
    folder = _write(tmp_path / "data", _columns(0.3, 0, 0.2, 0.1 * STEPS % 3, pitch, 0.1 * STEPS % 3, 1))
    with pytest.raises(
        DataError, match=r"pitch near 90 degrees .* say --state-layout pose --embodiment autoeval-widowx"
    ):
        open_data_set(folder)
    for embodiment in ("autoeval-widowx", "bridge-widowx"):
        open_data_set(folder, Selection(state_layout="pose", embodiment=embodiment))


def test_a_copied_description_is_not_believed(tmp_path):
    """Bridge's, whose ten numbers are not the seven that are there."""
    description = "Robot state, consists of [7x robot joint angles, 2x gripper position, 1x door opening angle]."
    assert _read(_write(tmp_path / "data", recordings.make_states(T), description=description))[0] == "pose"


def test_eight_numbers_are_padded_where_the_seventh_is_0_throughout(tmp_path):
    states = recordings.make_states(T)
    layout, episode = _read(_write(tmp_path / "data", np.insert(states, 6, 0, axis=1)))
    assert layout == "pose-pad"
    np.testing.assert_array_equal(episode.states, states)


def test_a_later_episode_with_another_padding_is_left_out(tmp_path):
    padded = [np.insert(recordings.make_states(6, seed), 6, 0, axis=1) for seed in range(20)]
    padded[18][2, 6] = 0.5
    recordings.write_rlds(tmp_path, [recordings.make_rlds_record(states) for states in padded])
    recordings.write_features(tmp_path, state_width=8)
    problems = []
    episodes = list(open_data_set(tmp_path, report=problems.append).episodes)
    assert [episode.index for episode in episodes] == [*range(18), 19]
    assert len(problems) == 1 and "seventh of 8 numbers was expected to be 0" in str(problems[0])


def test_two_grippers_of_0_to_1_are_no_fingers(tmp_path):
    names = [*"xyz", "roll", "pitch", "yaw", "gripper", "gripper"]
    states = np.hstack([recordings.make_states(T), np.ones((T, 1), np.float32)])
    problems = []
    assert not list(open_data_set(_write(tmp_path / "data", states, names), report=problems.append).episodes)
    assert "two fingers in metres were expected" in str(problems[0])


def test_the_user_may_know_the_layout(tmp_path, capsys):
    folder = _write(tmp_path / "data", QUATERNION)
    out = tmp_path / "rows.jsonl"
    assert main(["label", str(folder), "--state-layout", "quaternion-xyzw", "--out", str(out)]) == 0
    assert "state layout quaternion-xyzw" in capsys.readouterr().out
    phrases = [json.loads(line)["phrase"] for line in out.read_text().splitlines()]
    assert {phrase.partition(",")[0] for phrase in phrases[:-2]} == {"move forward"}
    for layout, says in (("pose", "has 8 numbers, but the layout pose has 7"), ("poes", "no state layout 'poes'")):
        assert main(["label", str(folder), "--state-layout", layout, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["libero", "quaternion-xyzw", "quaternion-wxyz"])
def test_rotations_are_measured_from_the_gripper_pointing_down(tmp_path, layout):
    """A turn of 0.1 rad a step about the base's z, over the place where axis times angle jumps, is counterclockwise."""
    turns = 0.11 * (STEPS - T / 2) / 4
    w, x, y, z = 0 * turns, np.cos(turns / 2), np.sin(turns / 2), 0 * turns  # about z, after half a turn about x
    rotation = {
        "libero": (np.pi * x, np.pi * y, 0),
        "quaternion-xyzw": (x, y, z, w),
        "quaternion-wxyz": (w, x, y, z),
    }[layout]
    gripper = FINGERS if layout == "libero" else (1,)
    _, episode = _read(_write(tmp_path / "data", _columns(0.3, 0, 0.2, *rotation, *gripper)), layout)
    np.testing.assert_allclose(episode.states[:, 3:5], 0, atol=1e-6)
    np.testing.assert_allclose(np.diff(episode.states[:, 5]), 0.11 / 4, atol=1e-6)


def test_a_run_and_autoevals_pickles_have_the_layout_of_their_format(tmp_path, capsys):
    (tmp_path / "run/episodes").mkdir(parents=True)
    (tmp_path / "run/meta.json").write_text("{}")
    for name in ("split", "state-layout"):
        assert main(["label", str(tmp_path / "run"), f"--{name}", "x", "--out", str(tmp_path / "rows.jsonl")]) == 2
        assert f"no {name.replace('-', ' ')} to choose" in capsys.readouterr().err
