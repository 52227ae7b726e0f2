"""Who gets in and sends as fast as the network takes it: what is ended, what makes room, and what takes turns."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

import msgpack
import pytest
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from tests.server.observing import observe
from tests.serving import IMAGE, serve, until
from vlm_local.server.serve import bind
from vlm_local.server.websocket import WebsocketDoor

PING, PONG, BINARY, CONTINUATION, FINAL = 0x9, 0xA, 0x2, 0x0, 0x80
HANDSHAKE = (
    b"GET /vla-eval HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
MASK = bytes(4)


@contextmanager
def open_door():
    with serve() as served:
        door = WebsocketDoor(served.service, bind("127.0.0.1", 0), horizon=1)
        try:
            yield served, door.port
        finally:
            door.close()


@pytest.fixture(scope="module")
def port():
    with open_door() as (_, port):
        yield port


def build_frame(head, data=b""):
    return bytes([head, 0x80 | len(data)]) + MASK + data


@pytest.mark.parametrize(
    "frames",
    [
        build_frame(FINAL | PING) * 5000,
        build_frame(FINAL | PONG, b"x" * 125) * 5000,
        build_frame(BINARY) + build_frame(CONTINUATION, b"x") * 3000,
        build_frame(FINAL | BINARY, b"\x80") * 5000,
    ],
    ids=["pings", "pongs", "parts of a message", "messages"],
)
def test_who_sends_small_frames_without_end_is_hung_up_on(port, frames):
    with socket.create_connection(("127.0.0.1", port), 10) as flood:
        flood.sendall(HANDSHAKE)
        answered = flood.recv(2**16)
        with suppress(ConnectionError):
            flood.sendall(frames)
            while more := flood.recv(2**16):
                answered += more
        assert answered.startswith(b"HTTP/1.1 101") and answered.count(b"\x8a\x00") <= 100  # pongs


def test_as_many_pings_as_a_client_sends_do_no_harm(port):
    with connect(f"ws://127.0.0.1:{port}/vla-eval") as client:
        assert all(client.ping().wait(10) for _ in range(50))


def test_a_robot_that_was_sent_nothing_back_rests_and_makes_room(monkeypatch):
    """vla-eval expects no answer to the begin of an episode."""
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 1)
    with open_door() as (served, port), connect(f"ws://127.0.0.1:{port}/vla-eval") as first:
        _act(first)
        first.send(msgpack.packb({"type": "episode_start", "payload": {}, "seq": 2, "timestamp": 0.0}))
        until(lambda: served.service.states.find_gripper("ws0").is_reset)
        until(lambda: _comes_in(port))


def _act(robot):
    picture = {"__ndarray__": True, "data": IMAGE.tobytes(), "dtype": "|u1", "shape": IMAGE.shape}
    observation = {"images": {"agentview": picture}, "task_description": "go"}
    robot.send(msgpack.packb({"type": "observation", "payload": observation, "seq": 1, "timestamp": 0.0}))
    assert msgpack.unpackb(robot.recv())["type"] == "action"


def test_what_was_answered_is_not_held_while_robots_rest(monkeypatch):
    monkeypatch.setattr("vlm_local.server.budget.MAX_HELD", 3 * IMAGE.nbytes)
    with open_door() as (_, port), ExitStack() as stack:
        for _ in range(4):
            _act(stack.enter_context(connect(f"ws://127.0.0.1:{port}/vla-eval")))


def _comes_in(port):
    with suppress(ConnectionClosed, InvalidHandshake, OSError), connect(f"ws://127.0.0.1:{port}/") as client:
        return bool(client.recv())
    return False


def test_pictures_for_the_live_page_are_encoded_one_at_a_time(monkeypatch):
    running, most = [], []

    def encode(*picture, **options):
        running.append(picture)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()
        return b"a file"

    monkeypatch.setattr("vlm_local.server.live.encode_file", encode)
    with observe() as server:
        server.act()
        until(lambda: server.get("/live/frame/robot")[0] == 200)
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(server.get, ["/live/frame/robot?format=png"] * 8))
    assert {status for status, *_ in answers} == {200} and max(most) == 1
