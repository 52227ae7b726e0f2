import json
import socket
import threading

import pytest

from tests.serving import SteeredEngine, build_body, serve, until
from vlm_local.errors import ConfigError
from vlm_local.server.service import ServerSettings


def _post_in_background(server, path, body=None):
    """A POST in a thread of its own -> a list that its status and answer come into."""
    result = []

    def post():
        status, _, answer = server.post(path, build_body() if body is None else body)
        result.extend((status, json.loads(answer)))

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    result_of = lambda: (thread.join(60), result)[1]  # noqa: E731
    return result_of


def test_one_request_runs_one_waits_and_the_third_is_refused():
    with serve() as server:
        server.engine.gate.clear()
        first = _post_in_background(server, "/s/arm/act")
        until(lambda: len(server.engine.requests) == 1)
        second = _post_in_background(server, "/s/arm/act")
        until(lambda: server.service.robots._robots["arm"].num_inside == 2)
        status, _, body = server.post("/s/arm/act", build_body())
        assert status == 503 and "one request running and one waiting" in json.loads(body)["error"]
        server.engine.gate.set()
        assert [first()[0], second()[0]] == [200, 200]
        server.act()


def test_health_answers_while_every_robot_has_two_requests_in():
    with serve(SteeredEngine(max_batch=1)) as server:
        server.engine.gate.clear()
        waiting = [_post_in_background(server, f"/s/robot-{index // 2}/act") for index in range(32)]
        until(lambda: server.service._num_inside == 32)
        assert server.get("/health")[0] == 200
        assert server.get("/metadata")[0] == 200
        assert server.service._num_inside == 32  # they still wait: neither answer had to
        server.engine.gate.set()
        assert all(result()[0] == 200 for result in waiting)


def test_four_robots_at_once_share_forwards():
    with serve() as server:
        server.engine.gate.clear()
        results = [_post_in_background(server, f"/s/arm-{index}/act?details=1") for index in range(1)]
        until(lambda: len(server.engine.requests) == 1)
        results += [_post_in_background(server, f"/s/arm-{index}/act?details=1") for index in range(1, 4)]
        until(lambda: server.service.policies.worker.num_waiting == 3)
        server.engine.gate.set()
        answers = [result()[1] for result in results]
        assert server.engine.batch_sizes == [1, 3]
        assert sorted(answer["robot"] for answer in answers) == [f"arm-{index}" for index in range(4)]
        assert {answer["step"] for answer in answers} == {0}


def test_seventeen_robots_are_one_too_many():
    with serve(settings=ServerSettings(max_robots=2)) as server:
        server.act("/s/a/act?details=1")
        server.act("/s/b/act?details=1")
        status, _, body = server.post("/s/c/act", build_body())
        assert status == 403 and "serves 2 robots" in json.loads(body)["error"]
        server.act("/s/a/act?details=1")


def test_names_that_were_made_up_make_room():
    with serve(settings=ServerSettings(max_robots=2)) as server:
        for index in range(10):
            assert server.post(f"/s/made-up-{index}/reset")[0] == 200
        assert server.act("/s/a/act?details=1")["step"] == 0
        assert server.act("/s/b/act?details=1")["step"] == 0
        assert server.post("/s/c/reset")[0] == 403
        assert server.act()["step"] == 0 and server.post("/reset")[0] == 200
        assert server.act("/s/a/act?details=1")["step"] == 1


def test_names_that_only_sent_rubbish_take_no_place():
    with serve(settings=ServerSettings(max_robots=1)) as server:
        for name in ("a", "b", "c"):
            assert server.post(f"/s/{name}/act", b"{")[0] == 400
        server.act("/s/d/act?details=1")
        assert server.post("/s/e/act", b"{")[0] == 403


def test_the_unnamed_robot_is_one_robot():
    with serve() as server:
        assert server.act()["robot"] == "robot"
        assert server.act("/s/robot/act?details=1")["step"] == 1


def test_a_client_that_gave_up_while_waiting_does_not_move_the_episode():
    with serve() as server:
        server.engine.gate.clear()
        first = _post_in_background(server, "/s/arm/act")
        until(lambda: len(server.engine.requests) == 1)
        body = build_body()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /s/arm/act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: server.service.robots._robots["arm"].num_inside == 2)
            num_sockets = len(server.http._sockets)
        until(lambda: len(server.http._sockets) < num_sockets)  # the server has seen it go
        server.engine.gate.set()
        assert first()[0] == 200
        until(lambda: server.service._num_inside == 0)
        assert len(server.engine.requests) == 1
        assert server.act("/s/arm/act?details=1")["step"] == 1


def test_a_flood_is_refused_and_the_robot_goes_on():
    with serve() as server:
        server.engine.gate.clear()
        flood = [_post_in_background(server, "/s/arm/act") for _ in range(80)]
        until(lambda: len(server.records) == 78)
        server.engine.gate.set()
        assert sorted(result()[0] for result in flood) == [200] * 2 + [503] * 78
        server.act()


def test_a_request_is_held_open_while_the_model_loads():
    loaded = threading.Event()
    with serve(lambda: loaded.wait(60) and SteeredEngine(), ServerSettings(max_robots=2)) as server:
        reset = _post_in_background(server, "/reset", b"")
        act = _post_in_background(server, "/act")
        until(lambda: server.service._held_open._value == 0)
        status, _, body = server.post("/act", build_body())  # one more than there are robots
        assert status == 503 and "still loading" in json.loads(body)["error"]
        assert server.get("/health")[0] == 503
        loaded.set()
        assert [reset()[0], act()[0]] == [200, 200]


@pytest.mark.parametrize("loading_s", [0, 0.1])
def test_while_it_loads_it_says_so_once_no_request_is_to_be_held(loading_s, caplog):
    caplog.set_level("DEBUG")
    loaded = threading.Event()
    with serve(lambda: loaded.wait(60) and SteeredEngine(), ServerSettings(loading_s=loading_s)) as server:
        for path in ("/act", "/reset"):
            status, _, body = server.post(path, build_body() if path == "/act" else b"")
            assert status == 503 and "still loading" in json.loads(body)["error"]
        status, _, body = server.get("/health")
        assert (status, json.loads(body)["status"]) == (503, "loading")
        polls = [record.levelname for record in caplog.records if "route=/health" in record.getMessage()]
        assert polls == ["DEBUG"]  # asked every second while a model loads
        assert server.get("/metadata")[0] == 200
        loaded.set()
        until(lambda: server.get("/health")[0] == 200)
        server.act()


def test_a_model_that_could_not_be_loaded_is_told_as_such():
    def load():
        raise ConfigError("no such model")

    with serve(load) as server:
        for path in ("/act", "/reset"):
            status, headers, body = server.post(path, build_body() if path == "/act" else b"")
            assert status == 503 and "could not be loaded" in json.loads(body)["error"]
            assert "Retry-After" not in headers  # it does not come back
        assert json.loads(server.get("/health")[2])["status"] == "failed"


def test_those_inside_may_finish_when_the_server_stops_and_nobody_new_comes_in():
    with serve() as server:
        server.engine.gate.clear()
        first = _post_in_background(server, "/s/arm/act")
        until(lambda: len(server.engine.requests) == 1)
        drained = []
        thread = threading.Thread(target=lambda: drained.append(server.service.drain(60)))
        thread.start()
        until(server.service.stopping.is_set)
        status, _, body = server.post("/act", build_body())
        assert status == 503 and "stopping" in json.loads(body)["error"]
        assert server.get("/health")[0] == 503
        server.engine.gate.set()
        assert first()[0] == 200
        thread.join(60)
        assert drained == [True]
