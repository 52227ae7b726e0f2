"""The gripper never lets go of what it holds unless the record says why."""

import json
import socket

import pytest

from tests.server.observing import observe
from tests.serving import PROPRIO, ask, build_body, serve, until
from vlm_local.data.runs import read_run
from vlm_local.errors import EngineError
from vlm_local.server.episodes import EpisodeSettings
from vlm_local.server.service import ServerSettings

PAUSES = ServerSettings(EpisodeSettings(idle_s=0.0))  # every step comes after a pause


def _measure(opening):
    return None if opening is None else [*PROPRIO[:6], opening]


def _command(server, opening=None, **fields):
    return server.act(proprio=_measure(opening), **fields)["action"][6]


def _close(server):
    server.engine.phrase = "close gripper"
    assert _command(server) == 0
    server.engine.phrase = "move up"


@pytest.mark.parametrize("opening", [None, 0.4, 1.0])  # 1.0: a gripper that was just told to close still reads open
def test_it_stays_closed_over_a_changed_full_stop(opening):
    with serve() as server:
        _close(server)
        answer = server.act(instruction="put the eggplant in the basket.", proprio=_measure(opening))
        assert (answer["episode"], answer["action"][6]) == (1, 0)


def test_it_stays_as_it_is_over_pauses():
    with serve(settings=PAUSES) as server:
        _close(server)
        assert [_command(server) for _ in range(3)] == [0, 0, 0]
        server.engine.phrase = "open gripper"
        assert _command(server) == 1
        server.engine.phrase = "stop"
        assert [_command(server, opening) for opening in (None, 0.5, 0.9)] == [1, 1, 1]
        assert server.newest_record().started_by == "idle"


def test_it_stays_closed_over_a_jump_of_the_arm():
    with serve() as server:
        server.engine.phrase = "close gripper"
        server.act(proprio=[0.3, 0, 0.1, 0, 0, 0, 0.4])
        server.engine.phrase = "stop"
        answer = server.act(proprio=[0.5, 0, 0.1, 0, 0, 0, 0.4])
        assert (answer["episode"], answer["action"][6]) == (1, 0)


@pytest.mark.parametrize("opening", [None, 0.4])
def test_a_fault_at_the_first_step_of_an_episode_drops_nothing(opening):
    with serve(settings=PAUSES) as server:
        _close(server)
        server.engine.fault = EngineError("out of memory")
        answer = server.act(proprio=_measure(opening))
        assert (answer["step"], answer["action"][6], answer["fault"]) == (0, 0, "out of memory")
        server.engine.fault = None
        assert _command(server) == 0


@pytest.mark.parametrize(("opening", "command"), [(None, 1), (1.0, 1), (0.4, 0)])
def test_a_fault_at_the_very_first_step_leaves_it_as_measured_from_then_on(opening, command):
    with serve() as server:
        server.engine.fault = EngineError("out of memory")
        assert _command(server, opening) == command
        server.engine.fault, server.engine.phrase = None, "stop"
        assert [_command(server) for _ in range(2)] == [command, command]


def test_a_reset_begins_anew_as_measured_or_open():
    with serve() as server:
        _close(server)
        for opening, command in ((None, 1), (0.4, 0), (1.0, 1)):
            server.post("/reset")
            assert _command(server, opening) == command


def test_a_gripper_that_someone_opened_counts_as_open_and_the_record_says_so():
    with serve() as server:
        _close(server)
        assert [_command(server, opening) for opening in (1.0, 1.0, 0.3, None)] == [0] * 4  # it is still closing
        answer = server.act(proprio=_measure(1.0))
        assert answer["action"][6] == 1 and "opened by someone else" in answer["extra"]["gripper"]
        assert "gripper" not in server.act(proprio=_measure(1.0))["extra"]


def test_who_trusts_the_command_alone_can_say_so():
    with serve(settings=ServerSettings(EpisodeSettings(follow_gripper=False))) as server:
        _close(server)
        assert [_command(server, opening) for opening in (0.3, 1.0, 1.0)] == [0, 0, 0]
        server.post("/reset")
        assert _command(server, 1.0) == 1


@pytest.mark.parametrize(("opening", "command"), [(0.5, 0), (0.85, 0), (0.86, 1), (1.0, 1), (None, 1)])
def test_a_gripper_that_someone_closed_in_a_pause_stays_closed_and_an_open_one_open(opening, command):
    with serve(settings=PAUSES) as server:
        server.engine.phrase = "open gripper"
        _command(server, 1.0)
        server.engine.phrase = "stop"
        answer = server.act(proprio=_measure(opening))
        assert answer["action"][6] == command
        assert ("closed by someone else" in answer["extra"].get("gripper", "")) == (command == 0)


def test_made_up_names_do_not_make_it_forgotten(monkeypatch):
    monkeypatch.setattr("vlm_local.server.state._MAX_NAMES", 3)
    with serve() as server:
        _close(server)
        for number in range(6):
            server.post(f"/s/made-up-{number}/reset")
        assert _command(server) == 0


def test_an_unknown_gripper_is_opened_with_a_word():
    with serve() as server:
        server.engine.phrase = "stop"
        answer = server.act(proprio=None)
        assert answer["action"][6] == 1 and "neither recorded nor measured" in answer["extra"]["gripper"]


def test_after_a_restart_it_is_as_the_run_before_left_it(tmp_path):
    with observe(tmp_path / "first") as server:
        server.engine.phrase = "close gripper"
        server.act("/s/left/act?details=1", proprio=None)
        server.act("/s/right/act?details=1", proprio=None)
        server.post("/s/right/reset")
    with observe(tmp_path / "second", previous=tmp_path / "first") as server:
        server.engine.phrase = "stop"
        for _ in range(2):
            assert server.act("/s/left/act?details=1", proprio=None)["action"][6] == 0
        assert server.act("/s/right/act?details=1", proprio=None)["action"][6] == 1  # it was reset
        until(lambda: server.observed.report_recording()["written"] == 3)
    commands = {
        episode.robot: [line["action"][6] for line in episode.lines]
        for episode in read_run(tmp_path / "second", pytest.fail)
    }
    assert commands == {"left": [0, 0], "right": [1]}


_STATE = '{"held": {"all": null, "robots": {"robot": null}}, "grippers": %s}'  # the robot was released alone


@pytest.mark.parametrize(
    "state",
    [
        '{"held": ',
        200_000 * "[",
        _STATE % "[]",
        *(_STATE % f'{{"robot": {{"command": {command}}}}}' for command in ('"open"', "NaN", "[]", "2")),
    ],
    ids=range(7),
)
def test_a_state_that_cannot_be_read_holds_every_robot(state, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state.json").write_text(state)
    with observe(tmp_path / "new", previous=tmp_path / "old") as server:
        assert "cannot be read" in server.act()["fault"]
        assert json.loads(server.get("/health")[2])["held"]["all"]
        server.post("/release")
        assert server.act()["fault"] is None


def test_an_answer_that_nobody_waited_for_turns_no_gripper_and_is_no_step(tmp_path):
    """A client that gives up after some seconds asks again with a new picture. Its arm never heard of that answer."""
    with observe(tmp_path) as server:
        server.engine.phrase = "move up"
        assert _command(server, 1.0) == 1
        server.engine.phrase = "close gripper"
        server.engine.gate.clear()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            body = build_body(proprio=_measure(1.0))
            client.sendall(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: len(server.engine.requests) == 2)
        assert ask(server.port, "GET", "/health")[0] == 200  # by now the server has read that the client is gone
        server.engine.gate.set()
        until(lambda: (tmp_path / "refusals.jsonl").is_file())
        server.engine.phrase = "move up"
        assert [_command(server, 1.0) for _ in range(2)] == [1, 1]
        until(lambda: server.observed.report_recording()["written"] == 3)
    (episode,) = read_run(tmp_path, pytest.fail)
    assert [line["step"] for line in episode.lines] == [0, 2, 3]
    assert json.loads((tmp_path / "refusals.jsonl").read_text())["status"] == 499
