"""A person stops a robot, or all, and lets them go on."""

import json
import threading

import pytest

from tests.server.observing import observe
from tests.server.test_live import Viewer
from tests.serving import PHRASE, build_body, serve, until
from vlm_local.data.runs import read_run
from vlm_local.errors import EngineError
from vlm_local.server.access import Gate
from vlm_local.server.service import ServerSettings
from vlm_local.server.state import RobotStates, find_previous

STILL = [0, 0, 0, 0, 0, 0]


def _say(server, path, **body):
    status, _, answer = server.post(path, json.dumps(body).encode() if body else b"")
    assert status == 200, answer
    return json.loads(answer)


def _act(server, robot="left", **fields):
    return server.act(f"/s/{robot}/act?details=1", **fields)


def _is_still(answer, gripper=1):
    return answer["action"] == [*STILL, gripper] and answer["phrase"] is None


def test_all_robots_stand_still_until_they_are_released_however_long_it_takes(tmp_path):
    with observe(tmp_path, ServerSettings(max_held=1)) as server:
        server.engine.phrase = "move up, close gripper"
        assert _act(server)["action"][6] == 0
        told = _say(server, "/hold", reason="a hand is in the way")
        assert told == {
            "status": "held", "robot": None, "reason": "a hand is in the way", "survives_restart": True,
        }  # fmt: skip
        num_asked = len(server.engine.requests)
        held = [_act(server, proprio=None) for _ in range(8)]
        assert all(_is_still(answer, gripper=0) for answer in held)
        assert [answer["step"] for answer in held] == list(range(1, 9))
        assert _is_still(_act(server, "right"))
        assert len(server.engine.requests) == num_asked
        assert _say(server, "/release")["status"] == "released"
        assert _act(server)["phrase"] == "move up, close gripper"
        until(lambda: server.observed.report_recording()["written"] == 11)
    left, _ = read_run(tmp_path, pytest.fail)
    assert [bool(line["fault"]) for line in left.lines] == [False, *[True] * 8, False]
    assert all("a hand is in the way" in line["fault"] for line in left.lines[1:9])
    assert left.lines[1]["extra"]["hold"]["reason"] == "a hand is in the way"


def test_a_hold_of_a_name_that_no_robot_has_says_who_is_here():
    with serve() as server:
        assert _say(server, "/s/left/hold")["note"] == "no robot of this name is here now; here: none"
        assert _is_still(_act(server))  # it counts for a robot that comes later
        assert "note" not in _say(server, "/s/left/release")
        for path in ("/s/Left/hold", "/s/Left/release"):
            assert _say(server, path)["note"] == "no robot of this name is here now; here: left"
        assert "note" not in _say(server, "/hold")


def test_one_robot_is_held_and_one_is_let_go_alone():
    with serve() as server:
        _say(server, "/s/left/hold")
        assert _is_still(_act(server)) and _act(server, "right")["phrase"] == PHRASE
        _say(server, "/hold")
        _say(server, "/s/right/release")
        assert _is_still(_act(server)) and _act(server, "right")["phrase"] == PHRASE
        assert _is_still(server.act())  # the robot without a name
        held = json.loads(server.get("/health")[2])["held"]
        assert held["all"]["reason"] == "POST /hold" and held["robots"] == {"right": None}
        _say(server, "/release")
        assert [_act(server, robot)["phrase"] for robot in ("left", "right")] == [PHRASE] * 2


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"reason": 5}', b'{"reason": "%s"}' % (b"x" * 300), b"\xff"])
def test_no_body_is_so_wrong_that_the_robot_goes_on(body):
    with serve() as server:
        assert server.post("/hold", body)[0] == 200
        assert _is_still(server.act())


@pytest.mark.parametrize("fault", [None, EngineError("dead")])
def test_an_answer_that_was_being_made_does_not_move_the_arm_any_more(fault):
    with serve(settings=ServerSettings(on_fault="error")) as server:
        server.engine.gate.clear()
        server.engine.fault = fault
        answers = []
        robot = threading.Thread(target=lambda: answers.append(server.act()))
        robot.start()
        until(lambda: server.engine.requests)
        _say(server, "/hold")
        server.engine.gate.set()
        robot.join()
        assert _is_still(answers[0]) and "held by a person" in answers[0]["fault"]
        server.engine.fault = None
        _say(server, "/release")
        assert server.act()["phrase"] == PHRASE


def test_a_held_robot_is_answered_while_the_model_is_broken():
    with serve(settings=ServerSettings(on_fault="error")) as server:
        server.act()
        server.engine.fault = EngineError("dead")
        assert server.post("/act", build_body())[0] == 503
        _say(server, "/hold")
        assert _is_still(server.act())


def test_a_reset_of_a_held_robot_does_not_open_its_gripper():
    with serve() as server:
        server.engine.phrase = "close gripper"
        server.act(proprio=None)
        _say(server, "/hold")
        server.post("/reset")
        assert _is_still(server.act(proprio=None), gripper=0)
        _say(server, "/release")
        server.engine.phrase = "stop"
        assert server.act(proprio=None)["action"][6] == 1  # the reset counts now


def test_it_stays_held_over_a_restart_until_it_is_released(tmp_path):
    with observe(tmp_path / "1") as server:
        _say(server, "/s/left/hold", reason="tea")
    with observe(tmp_path / "2", previous=tmp_path / "1") as server:
        assert "tea" in _act(server)["fault"] and _act(server, "right")["fault"] is None
    with observe(tmp_path / "3", previous=tmp_path / "2") as server:
        assert "tea" in _act(server)["fault"]
        assert _say(server, "/s/left/release")["survives_restart"]
    with observe(tmp_path / "4", previous=tmp_path / "3") as server:
        assert _act(server)["phrase"] == PHRASE


def test_a_server_goes_on_with_the_run_of_its_own_port_and_no_run_is_gone_on_with_twice(tmp_path):
    for port in (8002, 8001):
        (tmp_path / str(port) / "episodes").mkdir(parents=True)
        states = RobotStates(tmp_path / str(port), port=port)
        states.hold(f"arm-{port}", "tea")
        states.close()
    for number, (port, taken) in enumerate([(8002, 8002), (8003, 8001)]):  # 8001's is newer, and 8003 has none
        previous = find_previous(tmp_path, port)
        assert previous == tmp_path / str(taken)
        (tmp_path / f"next-{number}").mkdir()
        states = RobotStates(tmp_path / f"next-{number}", previous, port)
        assert states.names == [f"arm-{taken}"] and states.find_hold(f"arm-{taken}")
        states.close()
    assert find_previous(tmp_path, 8001) is None


def test_a_hold_that_a_full_disk_did_not_take_is_written_when_there_is_room(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vlm_local.server.state_file._RETRY_S", 0.01)
    with observe(tmp_path / "1") as server:
        (tmp_path / "1" / "state.json.new").mkdir()  # what cannot be opened for writing, also by root
        for _ in range(3):
            assert _say(server, "/s/left/hold", reason="tea")["survives_restart"] is False
        (tmp_path / "1" / "state.json.new").rmdir()
        until(lambda: "tea" in (tmp_path / "1" / "state.json").read_text())
        assert _say(server, "/s/right/hold")["survives_restart"]
    told = [record.levelname for record in caplog.records if "state.json" in record.message]
    assert told == ["ERROR", "WARNING"]  # once when it begins and once when it is over
    with observe(tmp_path / "2", previous=tmp_path / "1") as server:
        assert "tea" in _act(server)["fault"]


def test_a_hold_that_a_full_disk_did_not_take_is_tried_again_at_the_end(tmp_path):
    with observe(tmp_path / "1") as server:
        (tmp_path / "1" / "state.json.new").mkdir()
        assert _say(server, "/s/left/hold", reason="tea")["survives_restart"] is False
        (tmp_path / "1" / "state.json.new").rmdir()
    with observe(tmp_path / "2", previous=tmp_path / "1") as server:
        assert "tea" in _act(server)["fault"]


def test_without_a_recording_it_says_that_a_restart_forgets():
    with serve() as server:
        assert _say(server, "/hold")["survives_restart"] is False


def test_who_may_not_drive_may_not_hold_or_release():
    with serve(settings=ServerSettings(gate=Gate("secret-token"))) as server:
        assert server.post("/hold")[0] == server.post("/release")[0] == 401
        assert server.post("/t/secret-token/s/left/hold")[0] == 200


def test_made_up_names_end_somewhere_and_who_is_known_and_all_can_still_be_held(monkeypatch):
    monkeypatch.setattr("vlm_local.server.state._MAX_NAMES", 3)
    with serve() as server:
        statuses = [server.post(f"/s/made-up-{number}/hold")[0] for number in (0, 1, 2, 3, 0)]
        assert statuses == [200, 200, 200, 403, 200]
        assert server.post("/hold")[0] == 200
        assert _is_still(server.act())


def test_open_pages_hear_of_it_at_once(monkeypatch):
    monkeypatch.setattr("vlm_local.server.live._STATUS_EVERY_S", 3600)
    with observe() as server:
        viewer = Viewer(server)
        viewer.read("status")
        _say(server, "/s/left/hold", reason="tea")
        assert viewer.read("status")["held"]["robots"]["left"]["reason"] == "tea"
        viewer.close()
