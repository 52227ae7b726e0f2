import numpy as np
import pytest

from vlm_local.actions import StepTable
from vlm_local.errors import DataError
from vlm_local.lab.offline.calibrate import (
    MIN_COUNT,
    build_table,
    collect,
    find_lost_phrases,
    list_cells,
    list_phrase_actions,
)
from vlm_local.types import Episode


def _episode(step: np.ndarray, num_steps: int, with_actions: bool = True) -> Episode:
    """Constant motion of `step` (7,) a control step, commanded as half as much again."""
    states = np.arange(num_steps)[:, None] * np.array(step)
    actions = np.tile(1.5 * np.array(step), (num_steps, 1)) if with_actions else None
    return Episode(0, "go", states, actions, lambda step: None, "made up")


def test_sizes_are_the_mean_labelled_motion_a_step():
    x, z = np.eye(7)[0], np.eye(7)[2]
    episodes = [_episode(0.012 * x, 33), _episode(-0.018 * z, 18), _episode(0.14 * np.eye(7)[5], MIN_COUNT + 2)]
    calibration = collect(episodes)
    table, counts = build_table(calibration)
    assert counts == {"xyz_m": 30 + 15, "tilt_rad": 0, "yaw_rad": MIN_COUNT - 1}
    assert (table.x_m, table.y_m, table.z_m) == (0.014,) * 3
    assert table.yaw_rad == StepTable().yaw_rad, "one step too few is too few"
    cells = {cell["label"]: cell for cell in list_cells(calibration)}
    assert cells["move forward"]["motion_mean"] == pytest.approx(0.012)
    assert cells["move forward"]["action_mean"] == pytest.approx(0.018)
    assert cells["move forward"]["motion_spread"] == pytest.approx(0, abs=1e-9)
    assert cells["move forward"]["trusted"] and not cells["move down"]["trusted"]
    assert "move up" not in cells


def test_a_yaw_that_crosses_180_degrees_is_no_large_turn():
    """Its label is ECoT's, with the sign of the jump; the arm goes on turning by as little as before."""
    states = np.zeros((60, 7), np.float32)
    states[:, 5] = (2.5 + 0.12 * np.arange(60) + np.pi) % (2 * np.pi) - np.pi
    calibration = collect([Episode(0, "go", states, None, lambda step: None, "made up")])
    table, counts = build_table(calibration)
    assert counts["yaw_rad"] >= MIN_COUNT and table.yaw_rad == pytest.approx(0.12, abs=1e-5)
    assert [cell["label"] for cell in list_cells(calibration) if cell["axis"] == "yaw"] == ["rotate counterclockwise"]


def test_spread_is_the_standard_deviation():
    random = np.random.default_rng(0)
    steps = random.uniform(0.011, 0.03, 200)
    states = np.zeros((200, 7))
    states[:, 0] = steps.cumsum()
    calibration = collect([Episode(0, "go", states, None, lambda step: None, "made up")])
    (cell,) = (cell for cell in list_cells(calibration) if cell["label"] == "move forward")
    moved = (states[3:, 0] - states[:-3, 0]) / 3
    assert cell["motion_mean"] == pytest.approx(moved.mean())
    assert cell["motion_spread"] == pytest.approx(moved.std())
    assert cell["action_mean"] is None and list_phrase_actions(calibration) == []


def test_the_mean_action_of_a_phrase():
    step = np.array([0.02, 0.02, 0, 0, 0, 0, 0])
    (row,) = list_phrase_actions(collect([_episode(step, 40)]))
    assert row["phrase"] == "move forward left" and row["count"] == 37 and row["trusted"]
    np.testing.assert_allclose(row["action_mean"], 1.5 * step)


def test_tilt_is_measured_on_the_joint_that_gave_the_word():
    roll = collect([_episode(0.2 * np.eye(7)[3] + 0.01 * np.eye(7)[4], 40)])
    pitch = collect([_episode(0.15 * np.eye(7)[4], 40)])
    assert roll.tilts == {"roll": 37, "pitch": 0} and pitch.tilts == {"roll": 0, "pitch": 37}
    assert build_table(roll)[0].tilt_rad == 0.2 and build_table(pitch)[0].tilt_rad == 0.15


def test_the_round_trip_finds_sizes_that_are_too_small():
    assert find_lost_phrases(StepTable()) == []
    assert find_lost_phrases(StepTable(*[0.03] * 3, 0.3, 0.3)) == []
    exactly_the_threshold = StepTable(*[0.01] * 3, 0.1, 0.1)  # a strict comparison keeps 27 at most
    assert len(find_lost_phrases(exactly_the_threshold)) >= 513 - 27
    assert "move forward left" in find_lost_phrases(StepTable(x_m=0.03, y_m=0.0125))


def test_data_without_a_full_window_is_refused():
    with pytest.raises(DataError, match="no full window"):
        collect([_episode(np.ones(7), 3)])
