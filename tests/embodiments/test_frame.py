"""Rotations as a station carries them out: what is sent turns the gripper as the phrase says in the Bridge frame."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.embodiments.station import RESET_MEASURED, Wrist, e2m, from_bridge, to_bridge
from vlm_local.embodiments import find_file
from vlm_local.embodiments.frame import Frame

UP, DOWN_, LEFT, RIGHT = (0, 0.125, 0), (0, -0.125, 0), (0, 0, 0.125), (0, 0, -0.125)
HALF = math.pi / 2

# (commanded angles, meant, sent, Bridge angles afterwards), of the shared description of the station.
VECTORS = [
    ((0, HALF, 0), UP, (0, 0.125, 0), (0, 0.125, 0)),
    ((math.pi, 1.445796, math.pi), UP, (0, -0.125, 0), (0, 0.25, 0)),
    (RESET_MEASURED, DOWN_, (-0.068167, 0.125052, -0.068262), (-0.0015, -0.0959, 0.0001)),
    ((1.2, 1.4, 1.3), UP, (0.751140, -0.000632, 0.741154), (0.15939, 0.06337, 0.09508)),
    ((1.2, 1.4, 1.3), (0, 0.125, -0.125), (0.751140, -0.000632, 0.616154), (0.15939, 0.06337, -0.02992)),
]
AWAY_M = (0.3, 0.1, 0.1)  # not the reset pose, so that the measured angles count as the commanded ones


def _state(angles, position=AWAY_M) -> np.ndarray:
    return np.array([*position, *angles, 0.0, 0.39])


def _step(frame: Frame, state, meant):
    frame.read(state)
    return frame.send(np.array([0, 0, 0, *meant, 1.0]))


def _turn(first, second) -> float:
    return math.acos(np.clip((np.trace(e2m(first).T @ e2m(second)) - 1) / 2, -1, 1))


@pytest.mark.parametrize(("commanded", "meant", "sent", "after"), VECTORS)
def test_the_five_vectors(commanded, meant, sent, after):
    answer = _step(Frame("autoeval-widowx"), _state(commanded), meant)
    np.testing.assert_allclose(answer.action[3:6], sent, atol=2e-6)
    np.testing.assert_allclose(to_bridge(commanded + answer.action[3:6]), after, atol=6e-5)
    np.testing.assert_array_equal(answer.meant[3:6], meant)


@pytest.mark.parametrize("meant", [UP, DOWN_, LEFT, RIGHT])
@pytest.mark.parametrize("start", [(0, 0, 0), (0, 0.3, 0), (0.1, -0.25, 0.4), (-0.15, 0.2, -1.2), (0.05, 0.02, 2.0)])
def test_a_constant_phrase_turns_by_its_step_from_any_pose_whatever_sags(start, meant):
    wrist, frame = Wrist(from_bridge(start)), Frame("autoeval-widowx")
    if any(start):  # no reset was said, so the shadow begins at the measured pose: without sag it is the commanded one
        wrist = Wrist(from_bridge(start), sag=False)
    frame.begin(was_reset=True)
    for _ in range(6):
        before = wrist.bridge
        answer = _step(frame, wrist.state.astype(float), meant)
        wrist.act(answer.action)
        np.testing.assert_allclose(wrist.bridge - before, meant, atol=1e-6)
        assert answer.frame == "autoeval"


def test_a_long_way_through_vertical_and_around_turns_at_each_step_as_meant_and_swings_no_joint():
    random, wrist, frame = np.random.default_rng(0), Wrist(), Frame("autoeval-widowx")
    frame.begin(was_reset=True)
    around = [LEFT] * 20 + [UP, DOWN_, DOWN_, UP]  # far from a yaw of 0, back to vertical from both sides
    for meant in [*around, *random.choice([UP, DOWN_, LEFT, RIGHT, (0, 0.125, -0.125)], 100)]:
        expected = wrist.bridge + meant
        answer = _step(frame, wrist.state.astype(float), meant)
        wrist.act(answer.action)
        assert _turn(wrist.commanded, from_bridge(expected)) < 1e-6 and answer.shadow["note"] is None
        assert np.abs(answer.action[3:6]).max() < 1.6


def test_from_the_reset_pose_naive_and_measured_conversions_tilt_the_wrong_way():
    """The three conversions of "tilt up" from the same reset, as the shared description has them."""

    def play(convert):
        wrist = Wrist()
        pitches = []
        for _ in range(4):
            wrist.act(np.array([0, 0, 0, *convert(wrist), 1.0]))
            pitches.append(round(wrist.bridge[1], 3))
        return pitches

    shadow = Frame("autoeval-widowx")
    shadow.begin(was_reset=True)
    commanded = play(lambda wrist: _step(shadow, wrist.state.astype(float), UP).action[3:6])
    measured = play(lambda wrist: _step(Frame("autoeval-widowx"), _state(wrist.measured), UP).action[3:6])
    naive = play(lambda wrist: np.array(UP))
    assert commanded == [0.125, 0.25, 0.375, 0.5]
    assert naive == [0.125, 0.0, 0.125, 0.0]
    np.testing.assert_allclose(measured, [-0.125, 0.001, 0.123, 0.248], atol=0.004)


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.floats(-3.1, 3.1), min_size=3, max_size=3).map(np.array),
    st.lists(st.floats(-0.25, 0.25), min_size=3, max_size=3).map(np.array),
    st.sampled_from([0.0, 1e-300, 0.1, 0.25]),
)
def test_whatever_is_meant_the_gripper_turns_no_further_than_the_limit(angles, meant, limit):
    answer = _step(Frame("autoeval-widowx", max_turn_rad=limit), _state(angles), meant)
    assert np.isfinite(answer.action).all() and np.abs(answer.action[3:6]).max() <= 2
    assert _turn(angles, angles + answer.action[3:6]) <= limit + 1e-6


@pytest.mark.parametrize("start", [(0, 0, 0), (0, 0.3, 0.5), to_bridge((1.2, 1.4, 1.3))])
def test_a_turn_that_is_cut_goes_the_way_it_was_meant_as_far_as_it_may(start):
    angles, meant = from_bridge(start), np.array([0, 0.25, -0.25])
    answer = _step(Frame("autoeval-widowx", max_turn_rad=0.1), _state(angles), meant)
    after = angles + answer.action[3:6]
    assert _turn(angles, after) == pytest.approx(0.1, abs=1e-4) and "cut to 0.1" in answer.shadow["note"]
    np.testing.assert_allclose(to_bridge(after) - start, meant * 0.1 / math.hypot(*meant), atol=1e-3)


@pytest.mark.parametrize("side", [1, -1])
def test_no_turn_is_sent_of_which_the_robot_would_cut_an_angle(side, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(json.loads(find_file("autoeval-widowx").read_text()) | {"max_rotation_rad": 0.7}))
    angles = (side * 1.2, 1.4, side * 1.3)  # near vertical, so a small turn takes large angles: 0.75 of each sign
    answer = _step(Frame(str(path)), _state(angles), UP)
    assert not answer.action[3:6].any() and "would cut an angle of 0.75 rad" in answer.shadow["note"]


def _play(frame, wrist, meant, num_steps, carry_out):
    """Steps of a station that may do something else with an action; returns the shadows."""
    shadows = []
    for step in range(num_steps):
        answer = _step(frame, wrist.state.astype(float), meant)
        carry_out(step, answer.action)
        shadows.append(answer.shadow)
    return shadows


@pytest.mark.parametrize(("scale", "hypothesis"), [(0.0, "dropped"), (-0.5, "reversed")])
def test_steps_that_were_not_carried_out_are_noticed(scale, hypothesis):
    wrist, frame = Wrist(from_bridge((0, -0.4, 0)), sag=False), Frame("autoeval-widowx")

    def carry_out(step, action):
        wrist.act(np.array([*action[:3], *(scale * action[3:6]), 1.0]))

    shadows = _play(frame, wrist, UP, 5, carry_out)
    assert hypothesis in [shadow["hypothesis"] for shadow in shadows]
    assert all(shadow["note"] is None for shadow in shadows)
    found = next(shadow for shadow in shadows if shadow["hypothesis"] == hypothesis)
    assert _turn(found["commanded"], found["measured"]) < 0.05


def test_a_pose_that_nothing_explains_begins_the_shadow_anew_and_turns_nothing():
    frame = Frame("autoeval-widowx")
    _step(frame, _state(from_bridge((0, 0.2, 0))), UP)
    answer = _step(frame, _state(from_bridge((1.0, 0.2, 1.0))), UP)
    assert not answer.action[3:6].any() and "begins anew" in answer.shadow["note"]
    assert answer.shadow["hypothesis"] == "measured"
    answer = _step(frame, _state(from_bridge((1.0, 0.2, 1.0))), UP)
    assert answer.action[3:6].any() and answer.shadow["note"] is None


def test_a_reset_that_nobody_said_is_seen():
    frame, wrist = Frame("autoeval-widowx"), Wrist()
    frame.begin(was_reset=True)
    _play(frame, wrist, UP, 4, lambda step, action: wrist.act(action))
    wrist = Wrist()
    answer = _step(frame, wrist.state.astype(float), UP)
    assert answer.shadow["hypothesis"] == "reset"
    wrist.act(answer.action)
    np.testing.assert_allclose(wrist.bridge, UP, atol=1e-6)


def test_an_episode_without_a_reset_keeps_the_shadow():
    frame, wrist = Frame("autoeval-widowx"), Wrist()
    frame.begin(was_reset=True)
    _play(frame, wrist, UP, 2, lambda step, action: wrist.act(action))
    frame.begin(was_reset=False)
    _play(frame, wrist, UP, 1, lambda step, action: wrist.act(action))
    np.testing.assert_allclose(wrist.bridge, (0, 0.375, 0), atol=1e-6)
    frame.begin(was_reset=False)
    wrist.act(_step(frame, None, UP).action)  # nor is it forgotten where no pose comes
    np.testing.assert_allclose(wrist.bridge, (0, 0.5, 0), atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 4])
def test_an_episode_at_the_reset_pose_begins_there_though_nobody_said_a_reset(num_steps):
    frame, wrist = Frame("autoeval-widowx"), Wrist()
    frame.begin(was_reset=True)
    _play(frame, wrist, UP, num_steps, lambda step, action: wrist.act(action))
    frame.begin(was_reset=False)
    wrist = Wrist()
    _play(frame, wrist, UP, 1, lambda step, action: wrist.act(action))
    np.testing.assert_allclose(wrist.bridge, UP, atol=1e-6)


def test_without_a_measured_pose_only_a_reset_says_where_the_arm_is():
    frame = Frame("autoeval-widowx")
    answer = _step(frame, None, UP)
    assert not answer.action[3:6].any() and "sent no pose" in answer.shadow["note"]
    frame.begin(was_reset=True)
    np.testing.assert_allclose(_step(frame, None, UP).action[3:6], UP, atol=1e-12)
    np.testing.assert_allclose(_step(frame, None, UP).action[3:6], DOWN_, atol=1e-12)
    frame.begin(was_reset=True)  # the station drove its arm back
    np.testing.assert_allclose(_step(frame, None, UP).action[3:6], UP, atol=1e-12)


STATION = _state((0, 1.5, 0))


@pytest.mark.parametrize(
    ("state", "frame"),
    [
        (STATION, "autoeval"),
        (_state((0, 0.1, 0)), "bridge"),  # SimplerEnv's Octo wrapper, LeRobot's Bridge data
        (np.zeros(8), "bridge"),  # the submission test
        (np.array([0.3, 0, 0.1, 0, 1.5, 0, 1]), "bridge"),  # 7 numbers: nothing says of which frame
        (np.array([0.3, 0, 0.1, 0.02, 0.99, 0.05, 0.1, 1.0]), "bridge"),  # SimplerEnv's quaternion
        (None, "bridge"),  # openvla_client
    ],
)
def test_auto_converts_only_where_it_is_safe_to_believe(state, frame):
    answer = _step(Frame(), state, UP)
    assert answer.frame == frame
    if frame == "bridge":
        np.testing.assert_array_equal(answer.action, answer.meant)
        assert answer.shadow is None


def test_auto_stays_with_what_an_episode_began_with():
    frame = Frame()
    _step(frame, STATION, UP)
    assert _step(frame, _state((0, 0.5, 0)), UP).frame == "autoeval"  # tilted by more than 0.6 rad in the meantime
    assert _step(frame, None, UP).frame == "autoeval"
    assert _step(frame, np.zeros(7), UP).frame == "bridge"
    assert _step(frame, STATION, UP).frame == "bridge"
    frame.begin(was_reset=False)
    assert _step(frame, STATION, UP).frame == "autoeval"
    frame.begin(was_reset=False)
    assert _step(frame, _state((0, 0.1, 0)), UP).frame == "bridge"  # SimplerEnv, which never resets


def test_prompts_and_labels_see_the_bridge_frame_and_the_gripper_in_its_range():
    proprio = Frame().read(Wrist().state.astype(float))
    np.testing.assert_allclose(proprio[3:], [-0.0015, 0.0291, 0.0001, 1.0], atol=1e-4)
    assert Frame().read(np.array([0.3, 0, 0.1, 0, 0, 0, 0.5]))[6] == 0.5
    station, readings = Frame("autoeval-widowx"), {0.0: 0, 0.07: 0, 0.23: 0.5, 0.39: 1, 0.5: 1}  # as stations report it
    openings = [station.read(np.array([*AWAY_M, 0, HALF, 0, 0, reading]))[6] for reading in readings]
    np.testing.assert_allclose(openings, list(readings.values()), atol=1e-12)
    assert Frame("simpler-widowx").read(np.array([0.3, 0, 0.1, 0, 0, 0, 0, 0.5]))[6] == 0.5
