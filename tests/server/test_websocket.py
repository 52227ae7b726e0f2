"""A websocket connection is a robot: its name and episodes, who gets in, what ends it."""

import errno
import socket

import msgpack
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from tests.server.door import STATE, open_door, openpi_observation, port_of, vla_eval_observation
from tests.serving import serve, until
from vlm_local.server.access import Gate, parse_networks
from vlm_local.server.serve import bind
from vlm_local.server.service import ServerSettings
from vlm_local.server.websocket import WebsocketDoor


def test_an_episode_begins_with_a_connection_and_with_another_prompt(door):
    served, url = door
    episodes = []
    for _ in range(2):
        with connect(f"{url}/s/arm") as client:
            client.recv()
            for prompt in ("lift it", "lift it", "drop it"):
                client.send(openpi_observation(prompt=prompt))
                client.recv()
                record = served.newest_record()
                assert record.robot == "arm"
                episodes.append(record.episode)
    assert episodes == [0, 0, 1, 2, 2, 3]


def test_connections_at_once_are_robots_of_their_own(door):
    served, url = door
    robots = []
    with connect(url) as first, connect(url) as second:
        for client in (first, second):
            client.recv()
            client.send(openpi_observation())
            client.recv()
            robots.append(served.newest_record().robot)
    assert sorted(robots) == ["ws0", "ws1"]
    until(lambda: _find_name(*door) == "ws0")  # a script that connects anew is the same robot


def _find_name(served, url):
    with connect(url) as client:
        client.recv()
        client.send(openpi_observation())
        client.recv()
        return served.newest_record().robot


def test_no_arm_moves_by_the_instruction_of_the_connection_before(door):
    answers = []
    for instruction in ("lift it", None):
        with connect(f"{door[1]}/s/left/vla-eval") as client:
            client.send(vla_eval_observation(0, task_description=instruction))
            answers.append(msgpack.unpackb(client.recv()))
    assert [answer["type"] for answer in answers] == ["action", "error"]
    assert "no instruction has come over this connection" in answers[1]["payload"]["error"]


def test_an_answer_that_nobody_waited_for_turns_no_gripper():
    with open_door() as (served, url):
        served.engine.phrase = "close gripper"
        served.engine.gate.clear()
        with connect(f"{url}/s/left", compression=None) as client:
            client.recv()
            client.send(openpi_observation())
            until(lambda: served.engine.requests)
        served.engine.gate.set()
        until(lambda: served.records)
        served.engine.phrase = "move up"
        answer = served.act("/s/left/act?details=1", instruction="lift it", proprio=STATE.tolist())
        assert (answer["step"], answer["action"][6]) == (1, 1)


def test_who_has_no_token_does_not_come_in():
    with open_door(settings=ServerSettings(gate=Gate("correct-horse"))) as (_, url):
        for path, headers in (("/", {}), ("/t/wrong-horse/", {}), ("/", {"Authorization": "Api-Key wrong-horse"})):
            with pytest.raises(InvalidStatus) as refused:
                connect(url + path, additional_headers=headers)
            assert refused.value.response.status_code == 401
        for path, headers in (
            ("/t/correct-horse/", {}),
            ("/", {"Authorization": "Api-Key correct-horse"}),
            ("/", {"Authorization": "Bearer correct-horse"}),
        ):
            with connect(url + path, additional_headers=headers) as client:
                client.recv()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {"Origin": "https://evil.example"}, 403),
        ("/act", {}, 404),
        ("/s/..%2f/", {}, 404),
        ("/healthz", {}, 200),
        ("/health", {}, 200),
    ],
)
def test_what_is_answered_by_http(door, path, headers, status):
    assert _ask_http(door[1] + path, headers) == status


def _ask_http(url, headers=None):
    with pytest.raises(InvalidStatus) as answered:
        connect(url, additional_headers=headers)
    return answered.value.response.status_code


def test_a_server_that_cannot_answer_says_so_to_probes():
    with open_door() as (served, url):
        served.service.stopping.set()
        assert _ask_http(f"{url}/healthz") == 503


def test_an_address_is_let_in_or_not():
    with open_door(settings=ServerSettings(gate=Gate(None, parse_networks("10.0.0.0/8")))) as (_, url):
        assert _ask_http(url) == 403
    with open_door(settings=ServerSettings(gate=Gate(None, parse_networks("127.0.0.0/8")))) as (_, url), connect(url):
        pass


def test_who_sends_more_than_the_rate_hears_why():
    with open_door(settings=ServerSettings(rate_limit=0.001)) as (_, url), connect(f"{url}/vla-eval") as client:
        answers = []
        for seq in range(3):
            client.send(vla_eval_observation(seq))
            answers.append(msgpack.unpackb(client.recv()))
        assert [answer["type"] for answer in answers] == ["action", "error", "error"]
        assert "slow down" in answers[1]["payload"]["error"]


def test_one_robot_too_many_hears_why():
    with open_door(settings=ServerSettings(max_robots=1)) as (served, url):
        served.act("/s/other/act?details=1")
        with connect(url) as client:
            client.recv()
            assert "serves 1 robots" in client.recv()
            with pytest.raises(ConnectionClosed) as closed:
                client.recv()
        assert closed.value.rcvd.code == 1011


@pytest.mark.parametrize("name", ["Host", "Origin", "Authorization", "Sec-Fetch-Site"])
def test_a_header_that_comes_twice_is_no_failure_of_the_server(door, name):
    lines = [f"{name}: localhost", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    lines += ["Host: localhost", f"{name}: b", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="]
    with socket.create_connection(("127.0.0.1", port_of(door[1])), 60) as client:
        client.sendall("\r\n".join(["GET / HTTP/1.1", *lines, "", ""]).encode())
        assert client.recv(12) in (b"HTTP/1.1 101", b"HTTP/1.1 403")


class _ShortOfFiles:
    """A listener for whose first connection no file is left."""

    def __init__(self, listener):
        self._listener, self._errors = listener, [OSError(errno.EMFILE, "no file is left")]

    def accept(self):
        if self._errors:
            raise self._errors.pop()
        return self._listener.accept()

    def __getattr__(self, name):
        return getattr(self._listener, name)


def test_no_file_left_for_a_connection_is_not_the_end_of_the_door():
    with open_door(listener=_ShortOfFiles(bind("127.0.0.1", 0))) as (_, url), connect(url) as client:
        assert msgpack.unpackb(client.recv())


def test_the_end_of_the_server_ends_its_connections():
    with serve() as served:
        door = WebsocketDoor(served.service, bind("127.0.0.1", 0), 1)
        with connect(f"ws://127.0.0.1:{door.port}") as client:
            client.recv()
            door.close()
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=10)
