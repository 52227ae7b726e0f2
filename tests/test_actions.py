import numpy as np
import pytest

from tests.slow import slow
from vlm_local.actions import GripperLatch, StepTable, build_action, load_step_table
from vlm_local.errors import ConfigError, GrammarError
from vlm_local.primitives import TRANSITIONS, format_phrase, is_labelable, label_window, list_phrases, parse_phrase

LABELABLE = [phrase for phrase in list_phrases() if is_labelable(parse_phrase(phrase))]


def _execute(phrase: str, start: np.ndarray, table: StepTable) -> np.ndarray:
    """States (4, 7) of a robot that follows its commands exactly; its gripper arrives in one step."""
    primitive = parse_phrase(phrase)
    states = [start]
    for _ in range(TRANSITIONS):
        action = build_action(primitive, gripper=float(primitive.gripper > 0), table=table).astype(start.dtype)
        state = states[-1].copy()
        state[:6] += action[:6]
        if primitive.gripper:
            state[6] = action[6]
        states.append(state)
    return np.array(states)


@pytest.mark.parametrize(
    ("dtype", "tilt_axis"),
    [(np.float32, "pitch"), (np.float64, "roll"), slow(np.float64, "pitch"), slow(np.float32, "roll")],
)
def test_every_labelable_phrase_comes_back_when_executed_three_times(dtype, tilt_axis):
    table = StepTable(tilt_axis=tilt_axis)
    rng = np.random.default_rng(0)
    low, high = np.array([[0.1, -0.3, 0.0, -0.5, -0.5, -1.5], [0.45, 0.3, 0.3, 0.5, 0.5, 1.5]])
    assert len(LABELABLE) == 513
    for phrase in LABELABLE:
        opening = float(parse_phrase(phrase).gripper < 0)  # the word must change something
        for pose in rng.uniform(low, high, size=(10, 6)):
            states = _execute(phrase, np.append(pose, opening).astype(dtype), table)
            assert format_phrase(label_window(states)) == phrase, (phrase, pose)


def test_steps_of_exactly_the_threshold_would_not_come_back():
    table = StepTable(x_m=0.01, y_m=0.01, z_m=0.01, tilt_rad=0.1, yaw_rad=0.1)
    back = 0
    for phrase in LABELABLE:
        start = np.array([0, 0, 0, 0, 0, 0, float(parse_phrase(phrase).gripper < 0)])
        back += format_phrase(label_window(_execute(phrase, start, table))) == phrase
    assert back == 27  # those without a move


def test_the_action_of_a_phrase():
    primitive = parse_phrase("move forward right down, tilt up, rotate clockwise, close gripper")
    np.testing.assert_allclose(build_action(primitive, 0.0), [0.0125, -0.0125, -0.0125, 0, 0.125, -0.125, 0])
    np.testing.assert_allclose(build_action(primitive, 0.0, StepTable(tilt_axis="roll"))[3:5], [0.125, 0])


@pytest.mark.parametrize(("opening", "command"), [(None, 1), (1.0, 1), (0.95, 1), (0.85, 0), (0.1, 0), (0.0, 0)])
def test_the_gripper_starts_from_what_is_measured_and_keeps_its_state(opening, command):
    latch = GripperLatch()
    assert latch.update(0, opening) == command
    assert latch.update(0, 1 - command) == command  # only the first measurement counts
    assert latch.update(-1, None) == 0
    assert latch.update(0, 1.0) == 0
    assert latch.update(1, 0.0) == 1
    latch.reset()
    assert latch.update(0, opening) == command


def test_a_step_table_is_read_from_json(tmp_path):
    path = tmp_path / "steps.json"
    path.write_text('{"x_m": 0.02, "tilt_axis": "roll"}')
    assert load_step_table(path) == StepTable(x_m=0.02, tilt_axis="roll")


@pytest.mark.parametrize("text", ["{", '{"x": 1}', '{"x_m": 0}', '{"x_m": "far"}', '{"tilt_axis": "yaw"}', "[1]"])
def test_a_wrong_step_table_is_refused_with_its_name(tmp_path, text):
    path = tmp_path / "steps.json"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_step_table(path)


def test_slightly_is_the_same_movement_in_a_table_of_its_own(tmp_path):
    whole, small = "move forward left, tilt up, rotate clockwise, close gripper", StepTable().choose
    signs = parse_phrase(whole)
    assert parse_phrase("slightly " + whole) == signs and small(whole) == StepTable()
    slight = build_action(signs, 0.0, small("slightly " + whole))
    np.testing.assert_allclose(slight, [0.007, 0.007, 0, 0, 0.03, -0.0175, 0])
    path = tmp_path / "steps.json"
    path.write_text('{"x_m": 0.02, "slightly": {"tilt_rad": 0.01, "tilt_axis": "roll"}}')
    table = load_step_table(path)
    assert (
        table.choose("slightly tilt up") == StepTable(0.007, 0.007, 0.007, 0.01, 0.0175, "roll") and table.x_m == 0.02
    )
    assert StepTable(tilt_axis="roll").choose("slightly tilt up").tilt_axis == "roll"
    path.write_text('{"slightly": {"speed": 1}}')
    with pytest.raises(ConfigError, match="speed"):
        load_step_table(path)


@pytest.mark.parametrize("phrase", ["slightly stop", "slightly open gripper", "slightly", "move slightly up"])
def test_only_what_moves_the_arm_is_slight(phrase):
    with pytest.raises(GrammarError):
        parse_phrase(phrase)
