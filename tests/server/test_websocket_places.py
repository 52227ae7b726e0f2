"""Connections of the websocket have places and bytes, and nobody keeps a robot out of them."""

import socket
from contextlib import ExitStack, contextmanager, suppress

import msgpack
import pytest
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.sync.client import connect

from tests.server.door import open_door, openpi_observation, port_of, vla_eval
from tests.serving import PHRASE, read_answer, until
from vlm_local.server.serve import bind
from vlm_local.server.websocket import MAX_CONNECTIONS

BUDGET = "vlm_local.server.budget.MAX_HELD"
HANDSHAKE = (
    b"GET /vla-eval HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def _send_begin(url, client, num_bytes):
    """A handshake, and so many bytes of a frame of 8 MB."""
    client.connect(("127.0.0.1", port_of(url)))
    client.sendall(HANDSHAKE)
    assert b"101" in client.recv(64)
    client.sendall(b"\x82\xff" + (8_000_000).to_bytes(8) + bytes(4) + bytes(num_bytes))


def _has_ended(client):
    client.settimeout(0.01)
    try:
        while client.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True


def test_silent_connections_keep_no_robot_out(door):
    with connect(door[1]) as early, ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS + 20):
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(door[1]))))
        with connect(door[1]) as late:
            for client in (early, late):
                client.recv()
                client.send(openpi_observation())
                assert len(msgpack.unpackb(client.recv())["phrases"]) == 1


def test_half_sent_frames_keep_no_robot_out_that_still_shakes_hands(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 4)
    with open_door() as (_, url), ExitStack() as stack:
        half, robot, later = [[stack.enter_context(socket.socket()) for _ in range(count)] for count in (4, 1, 1)]
        for client in half:
            _send_begin(url, client, 1000)
        for client in robot + later:
            client.connect(("127.0.0.1", port_of(url)))
            client.sendall(HANDSHAKE[:40])
        until(lambda: sum(map(_has_ended, half)) == 2)
        robot[0].settimeout(60)
        robot[0].sendall(HANDSHAKE[40:])
        assert b"101" in robot[0].recv(64)


def test_frames_on_their_way_have_a_budget_and_the_largest_go(monkeypatch):
    monkeypatch.setattr(BUDGET, 1_000_000)
    with open_door() as (_, url), ExitStack() as stack:
        robot = stack.enter_context(connect(url))
        robot.recv()
        strangers = [stack.enter_context(socket.socket()) for _ in range(8)]
        for stranger in strangers:
            _send_begin(url, stranger, 400_000)
            robot.send(openpi_observation())
            assert msgpack.unpackb(robot.recv())["phrases"] == [PHRASE]
        until(lambda: sum(not _has_ended(stranger) for stranger in strangers) <= 2)
        assert not _has_ended(strangers[-1]) or not _has_ended(strangers[-2])


def test_frames_and_bodies_on_their_way_share_a_budget(monkeypatch):
    monkeypatch.setattr(BUDGET, 1_000_000)
    with open_door() as (served, url), ExitStack() as stack:
        small, large, frames, more = (stack.enter_context(socket.socket()) for _ in range(4))
        for client, length in ((small, 200_000), (large, 800_000)):
            client.connect(("127.0.0.1", served.port))
            head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length
            client.sendall(head + bytes(length - 100_000))
        _send_begin(url, frames, 400_000)
        assert read_answer(large).startswith(b"HTTP/1.1 503")
        assert not _has_ended(frames)
        _send_begin(url, more, 600_000)
        until(lambda: _has_ended(more))
        assert not _has_ended(frames)
        small.sendall(bytes(100_000))
        assert read_answer(small).startswith(b"HTTP/1.1 400")  # zeros: it was read to its end


def test_a_long_connection_comes_to_no_budget(monkeypatch):
    """What was answered is not counted any more."""
    monkeypatch.setattr(BUDGET, 1_000_000)
    with open_door() as (_, url), connect(url) as robot:
        robot.recv()
        for _ in range(12):
            robot.send(openpi_observation())
            assert msgpack.unpackb(robot.recv())["phrases"] == [PHRASE]


@contextmanager
def _deaf_clients(url, count):
    """Robots that were given an action, then send rubbish, each piece of which is answered, and read nothing. Gives
    them once they are stuck.
    """
    picture = {"__ndarray__": True, "data": bytes(768), "dtype": "|u1", "shape": (16, 16, 3)}
    observation = {"images": {"agentview": picture}, "task_description": "go"}
    rubbish = {f"{name:x>80}": 0 for name in range(13)}  # the answer is as long
    messages = (vla_eval("observation", payload) for payload in (observation, rubbish))
    first, frame = (b"\x82\xff" + len(message).to_bytes(8) + bytes(4) + message for message in messages)
    with ExitStack() as stack:
        deaf = [stack.enter_context(socket.socket()) for _ in range(count)]
        for client in deaf:
            for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                client.setsockopt(socket.SOL_SOCKET, buffer, 4096)
            client.connect(("127.0.0.1", port_of(url)))
            client.sendall(HANDSHAKE)
            assert b"101" in client.recv(64)
            client.sendall(first)
            client.settimeout(0.1)
        for client in deaf:
            with suppress(TimeoutError, ConnectionError):
                for _ in range(1000):
                    client.sendall(frame * 10)
        yield deaf


def test_who_reads_no_answer_keeps_no_robot_out_and_no_server_up(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 2)
    listener = bind("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # the system's own takes megabytes of answers
    with open_door(listener=listener) as (_, url), _deaf_clients(url, 2) as deaf:
        until(lambda: _is_answered(url))
        until(lambda: _is_closed(deaf[0]) or _is_closed(deaf[1]))


def _is_answered(url):
    with suppress(ConnectionClosed, InvalidHandshake, OSError), connect(url) as client:
        client.recv()
        client.send(openpi_observation())
        return msgpack.unpackb(client.recv())["phrases"] == [PHRASE]
    return False


def _is_closed(client):
    try:
        client.sendall(b"x")
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


def test_who_is_not_waited_for_is_not_hung_up_on(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 1)
    with open_door() as (served, url), connect(url) as client:
        client.recv()
        client.send(openpi_observation())
        client.recv()
        served.engine.gate.clear()
        client.send(openpi_observation())
        until(lambda: len(served.engine.requests) == 2)
        with socket.create_connection(("127.0.0.1", port_of(url)), 60) as second:
            assert read_answer(second) == b""
        served.engine.gate.set()
        assert msgpack.unpackb(client.recv())["phrases"] == [PHRASE]


def test_where_all_have_acted_the_one_that_has_rested_longest_makes_room(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 2)
    with open_door() as (_, url), ExitStack() as stack:
        robots = []
        for _ in range(3):
            robots.append(stack.enter_context(connect(url)))
            robots[-1].recv()
            robots[-1].send(openpi_observation())
            robots[-1].recv()
        robots[1].send(openpi_observation())
        assert msgpack.unpackb(robots[1].recv())["phrases"] == [PHRASE]
        with pytest.raises(ConnectionClosed):
            robots[0].recv(timeout=10)


def test_connections_that_have_ended_take_no_place(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 4)
    with open_door() as (_, url), connect(url) as robot:
        robot.recv()
        for _ in range(12):
            with connect(url) as other:
                other.recv()
        robot.send(openpi_observation())
        assert msgpack.unpackb(robot.recv())["phrases"] == [PHRASE]


def test_many_that_come_at_once_keep_no_more_places_than_there_are(monkeypatch):
    monkeypatch.setattr("vlm_local.server.websocket.MAX_CONNECTIONS", 4)
    with open_door() as (_, url), ExitStack() as stack:
        crowd = [stack.enter_context(socket.socket()) for _ in range(80)]
        for client in crowd:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port_of(url)))
        until(lambda: sum(not _has_ended(client) for client in crowd) <= 4)
