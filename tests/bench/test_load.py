import json
import threading

import numpy as np
import pytest

from tests.serving import serve
from vlm_local.bench.load import SoakSettings, compare_recording, measure_growth, soak
from vlm_local.bench.rough_robot import Diary, RoughRobot, paint_picture, read_stamp
from vlm_local.data.runs import RunWriter
from vlm_local.policy_options import PolicyOptions

ACTION = [0.0125, 0, 0, 0, 0, 0, 1]


@pytest.mark.long
def test_a_short_soak_passes():
    pytest.importorskip("openai", reason="the sidecar is reached through the openai package")
    settings = SoakSettings(robots=3, minutes=0.12, hz=8, fault_rate=0.04, kill_every_s=4)
    result = soak(PolicyOptions(model="random", deadline_ms=3000), settings)
    assert result["passed"], result["violations"]
    assert result["kills"] >= 1
    assert result["engine"] == "openai" and result["engine_counters"]["requests"] >= result["latency_ms"]["n"]
    assert result["steps_recorded"] >= result["steps_answered"] > 0
    json.dumps(result)


@pytest.mark.long
def test_a_short_soak_passes_where_the_servers_own_engine_is_killed():
    settings = SoakSettings(robots=2, minutes=0.3, hz=4, fault_rate=0, kill_every_s=5, sidecar=False)
    result = soak(PolicyOptions(deadline_ms=3000), settings)
    assert result["passed"], result["violations"]
    assert result["kills"] >= 1 and result["stand_stills"] >= 1


def _image(stamp: int) -> np.ndarray:
    image = paint_picture(0)
    image[0, :4, 0] = list(stamp.to_bytes(4, "little"))
    return image


def _record(folder, steps):
    writer = RunWriter(folder)
    writer.start_episode("left")
    for step, (action, stamp) in enumerate(steps):
        writer.add_step({"robot": "left", "episode": 0, "step": step, "action": action}, _image(stamp))
    writer.close()


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({(0, 0): (ACTION, 70), (0, 1): (ACTION, 71)}, None),
        ({(0, 1): (ACTION, 71)}, None),  # the robot hung up before the answer to step 0
        ({(0, 2): (ACTION, 72)}, "not recorded"),
        ({(0, 1): ([0] * 7, 71)}, "another action or frame"),
        ({(0, 1): (ACTION, 70)}, "another action or frame"),
    ],
)
def test_what_a_robot_was_told_must_be_in_the_recording_just_so(tmp_path, told, what):
    _record(tmp_path, [(ACTION, 70), (ACTION, 71)])
    num_recorded, missing = compare_recording({"left": Diary(answered=told)}, tmp_path)
    assert num_recorded == 2
    assert (what in missing[0]) if what else not missing


def test_a_robot_notices_what_is_no_answer():
    with serve() as server:
        robot = RoughRobot(server.url, "left", 100, 0, threading.Event())
        robot._act()
        assert len(robot.diary.answered) == 1 and not robot.diary.violations
        robot._take_answer({"action": [float("nan")] * 7}, 1, 1.0)
        robot._take_answer({"action": ACTION, "episode": 0, "step": 0, "fault": None}, 1, 1.0)
    robot._act()
    seen = robot.diary.violations
    assert "7 finite numbers" in seen[0] and "answered twice" in seen[1] and "got no" in seen[2]


def test_memory_growth_is_of_medians_after_the_start():
    flat = [50.0] * 20 + [100.0] * 80
    assert measure_growth(flat)["growth"] == 0
    grown = measure_growth([100.0 + step for step in range(100)])
    assert (grown["first"], grown["last"], grown["peak"]) == (123.5, 195.5, 199.0)


def test_stamps_survive_in_the_picture():
    assert read_stamp(_image(123_456_789)) == 123_456_789
