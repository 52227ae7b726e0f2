import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_local.embodiments import find_file
from vlm_local.errors import ConfigError, EngineClosed, EngineError, RequestError
from vlm_local.safety import Guard, HoldOnFault, Workspace, load_workspaces, parse_max_step, parse_workspace
from vlm_local.types import Decision, Observation

BOX = load_workspaces()["autoeval-sink"]
BOUNDS = np.array([BOX.x_m, BOX.y_m, BOX.z_m])
INSIDE = np.array([0.25, 0.0, 0.15])  # by more than a largest step
LARGEST = np.array([0.05] * 3 + [0.25] * 3)

SEEN = Observation(np.zeros((16, 16, 3), np.uint8), "go", None)

finite = st.floats(-1e3, 1e3)
positions = st.lists(st.floats(-2, 2), min_size=3, max_size=3).map(np.array)
actions = st.lists(finite, min_size=7, max_size=7).map(np.array)


class Fixed:
    """A policy that always answers the same action."""

    def __init__(self, action):
        self.action = np.asarray(action, dtype=np.float64)
        self.metadata = {"model": "fixed"}

    def reset(self, seed):
        pass

    def act(self, observation):
        return Decision(self.action, extra={"kept": 1})


def _guard(action, position, workspace=BOX) -> Decision:
    proprio = None if position is None else np.concatenate([position, [0, 0, 0, 1.0]])
    return Guard(Fixed(action), workspace).act(Observation(np.zeros((16, 16, 3), np.uint8), "go", proprio))


@settings(deadline=None)
@given(actions, positions)
def test_whatever_the_policy_says_the_arm_never_gets_further_out(action, position):
    """Distance to the box after the step is at most that before, on every axis; inside stays inside."""

    def outside(point):
        return np.maximum(np.maximum(BOUNDS[:, 0] - point, point - BOUNDS[:, 1]), 0)

    target = position + _guard(action, position).action[:3]
    assert (outside(target) <= outside(position) + 1e-12).all()


@settings(deadline=None)
@given(actions, positions)
def test_a_cut_only_shortens_and_never_turns_a_movement_around(action, position):
    answered = _guard(action, position).action
    assert np.isfinite(answered).all()
    assert (answered[:6] * np.sign(action[:6]) >= 0).all()
    assert (np.abs(answered[:6]) <= np.abs(action[:6])).all()
    assert (np.abs(answered[:6]) <= LARGEST).all()
    assert 0 <= answered[6] <= 1


@settings(deadline=None)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=6, max_size=6), st.floats(0, 1))
def test_what_is_allowed_is_left_alone(shares, gripper):
    action = np.array([*LARGEST * shares, gripper])
    decision = _guard(action, INSIDE)
    np.testing.assert_array_equal(decision.action, action)
    assert decision.extra == {"kept": 1}


def test_the_axes_that_were_cut_are_named_and_the_others_kept():
    position = np.array([BOX.x_m[1] - 0.002, 0.0, BOX.z_m[0] - 0.03])  # at the front edge, below the floor
    decision = _guard([0.0125, 0.0125, -0.0125, 0, 0, 0.4, 1], position)
    np.testing.assert_allclose(decision.action, [0.002, 0.0125, 0, 0, 0, 0.25, 1], atol=1e-12)
    assert decision.extra == {"kept": 1, "cut": ["x", "z", "yaw"]}


def test_an_arm_outside_may_come_back():
    position = np.array([BOX.x_m[1] + 0.1, 0.0, 0.15])
    np.testing.assert_allclose(_guard([-0.0125, 0, 0, 0, 0, 0, 1], position).action[0], -0.0125)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("column", [0, 5, 6])
def test_a_number_that_is_none_never_reaches_the_robot(bad, column):
    action = np.zeros(7)
    action[column] = bad
    for wrong in (action, np.zeros(column)):
        with pytest.raises(EngineError, match="7 finite"):
            _guard(wrong, INSIDE)


@pytest.mark.parametrize("position", [None, [0, 0, np.nan]])
def test_without_a_position_a_workspace_is_refused_and_no_workspace_needs_none(position):
    with pytest.raises(RequestError, match="proprio"):
        _guard(np.zeros(7), position)
    assert _guard(np.zeros(7), position, workspace=None).extra == {"kept": 1}


def test_a_workspace_is_named_or_written_out():
    assert parse_workspace("autoeval-drawer").z_m == (0.0216, 0.1637)
    assert parse_workspace("0.1:0.4,-0.2:0.2,0:0.3") == Workspace((0.1, 0.4), (-0.2, 0.2), (0, 0.3))
    for wrong in ("autoeval-cup", "0:1,0:1", "0.4:0.1,0:1,0:1", "0:1,0:0,0:1", "0:nan,0:1,0:1", "0:1:2,0:1,0:1"):
        with pytest.raises(ConfigError, match="workspace"):
            parse_workspace(wrong)


def test_a_users_file_names_its_own_stations_beside_autoevals(tmp_path):
    content = json.loads(find_file("bridge-widowx").read_text())
    boxes = {"bench": [[0.1, 0.4], [-0.2, 0.2], [0, 0.3]]}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**content, "station_workspaces_m": boxes}))
    assert parse_workspace("bench", str(path)) == Workspace((0.1, 0.4), (-0.2, 0.2), (0, 0.3))
    assert parse_workspace("autoeval-sink", str(path)) == BOX
    with pytest.raises(ConfigError, match="autoeval-cloth"):
        parse_workspace("bench", "auto")


def test_the_largest_step_is_six_numbers():
    assert parse_max_step("0.02,0.02,0.02,0.2,0.2,0") == (0.02, 0.02, 0.02, 0.2, 0.2, 0.0)
    for wrong in ("0.02", "a,b,c,d,e,f", "1,1,1,1,1,-1", "1,1,1,1,1,inf"):
        with pytest.raises(ConfigError, match="max-step"):
            parse_max_step(wrong)


def test_records_say_what_the_arm_was_held_to():
    assert Guard(Fixed(np.zeros(7)), BOX).metadata["workspace_m"][2] == [0.0871, 0.2340]


class Told(Fixed):
    """Notes what it is told; `fault` is raised by a reset."""

    def __init__(self):
        super().__init__([0.01, 0, 0, 0, 0, 0, 1])
        self.told, self.fault = [], None

    def reset(self, seed):
        self.told.append(seed)
        if self.fault is not None:
            raise self.fault

    def act(self, observation):
        self.told.append("act")
        return super().act(observation)


def test_an_episode_begins_once_with_its_seed_before_its_steps():
    policy = Told()
    robot = HoldOnFault(Guard(policy), max_held=2)
    robot.reset(7)
    for _ in range(2):
        robot.act(SEEN)
    assert policy.told == [7, "act", "act"]


def test_a_reset_that_failed_is_tried_again_before_the_next_step_and_no_arm_moves_meanwhile():
    policy = Told()
    policy.fault = ConnectionError("no answer")
    robot = HoldOnFault(Guard(policy), max_held=2)
    robot.reset(7)
    decision = robot.act(SEEN)
    assert not decision.action[:6].any() and "no answer" in decision.fault and policy.told == [7, 7]
    policy.fault = None
    assert [robot.act(SEEN).fault for _ in range(2)] == [None, None] and policy.told == [7, 7, 7, "act", "act"]


@pytest.mark.parametrize("fault", [EngineClosed("the server is stopping"), RequestError("another instruction")])
def test_a_reset_that_nothing_mends_is_no_stand_still(fault):
    policy = Told()
    policy.fault = fault
    with pytest.raises(type(fault)):
        HoldOnFault(Guard(policy), max_held=2).reset(7)
