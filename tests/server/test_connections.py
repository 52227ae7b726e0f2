"""Who is slow, many, large or a stranger takes nothing that a robot needs."""

import base64
import io
import json
import select
import socket
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image
from waitress.wasyncore import poll2

from tests.server.observing import observe
from tests.serving import ask, build_body, exchange, read_answer, serve, until
from tests.slow import slow
from vlm_local.processes import trim_heaps
from vlm_local.server.access import MAX_SMALL_BODY, Gate
from vlm_local.server.live import Hub
from vlm_local.server.service import ServerSettings

HALF = b"POST /act HTTP/1.1\r\nHost: x\r\nX: "
BUDGET = "vlm_local.server.budget.MAX_HELD"
LONG = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    with serve() as served:
        served.act()
        yield served


@pytest.fixture
def limit(monkeypatch):
    return lambda name, value: monkeypatch.setattr(f"vlm_local.server.connections.{name}", value)


@pytest.fixture
def connect(server):
    connections = []

    def connect(data=b""):
        connections.append(socket.create_connection(("127.0.0.1", server.port), 60))
        connections[-1].sendall(data)
        return connections[-1]

    yield connect
    for connection in connections:
        connection.close()


def test_half_open_connections_make_room_for_a_robot(server, connect, limit):
    limit("MAX_CONNECTIONS", 12)
    half = [connect(HALF) for _ in range(9)]
    server.act()  # they are read, so they hear why
    half += [connect(HALF) for _ in range(12)]
    for _ in range(10):
        server.act()
    assert b"503" in read_answer(half[0]).splitlines()[0]


@pytest.mark.parametrize("num_bytes", [0, 20])
def test_who_sends_its_next_step_or_waits_for_it_stays_where_others_have_asked_nothing(
    server, connect, limit, num_bytes
):
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    kept = connect(request)
    assert read_answer(kept).startswith(b"HTTP/1.1 200")
    kept.sendall(request[:num_bytes])
    limit("MAX_CONNECTIONS", 4)
    for _ in range(8):
        connect()
    kept.sendall(request[num_bytes:])
    assert read_answer(kept).startswith(b"HTTP/1.1 200")


def test_a_robot_does_not_wait_behind_each_stranger_for_a_look_at_all_connections(server, connect, monkeypatch):
    gate, looks = threading.Event(), []

    def look(*args):
        gate.wait(60)
        looks.append(poll2(*args))

    monkeypatch.setattr("vlm_local.server.connections.poll2", look)
    server.http._server.pull_trigger()
    for _ in range(100):
        connect(HALF)
    robot = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    gate.set()
    assert read_answer(robot).startswith(b"HTTP/1.1 200") and len(looks) < 60


def test_a_request_has_ten_seconds_and_a_connection_that_has_asked_has_more(server, connect, limit):
    kept = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_answer(kept).startswith(b"HTTP/1.1 200")
    limit("REQUEST_S", 0.2)
    slow = connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_answer(slow).startswith(b"HTTP/1.1 200")
    slow.sendall(HALF)
    while not select.select([slow], [], [], 0.02)[0]:  # a byte at a time
        slow.sendall(b"x")
    late, silent = [slow, connect(HALF), connect(LONG + b"xx")], [connect(), connect(b"\r\n\r\n")]
    for connection in late:
        head, _, body = read_answer(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and "did not come within" in json.loads(body)["error"]
    assert [read_answer(connection) for connection in silent] == [b"", b""]
    kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert read_answer(kept).startswith(b"HTTP/1.1 200")


def test_bodies_together_have_a_budget_and_the_largest_goes(server, connect, monkeypatch):
    monkeypatch.setattr(BUDGET, 1_000_000)
    small = build_body()
    robot = connect(b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(small) + small[:100_000])
    large = connect(LONG + b"x" * 950_000)
    head, _, body = read_answer(large).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503") and "large bodies" in json.loads(body)["error"]
    robot.sendall(small[100_000:])
    assert read_answer(robot).startswith(b"HTTP/1.1 200")


@contextmanager
def _being_answered(server):
    """While a robot's request is at the model."""
    server.engine.gate.clear()
    robot = threading.Thread(target=server.act)
    robot.start()
    try:
        until(lambda: server.engine.requests)
        yield
    finally:
        server.engine.gate.set()
        robot.join(60)


def test_a_very_large_body_gives_way_to_a_robot(limit):
    lists = b'{"image":[' + b"[]," * 4_000_000 + b"1]}"
    with serve() as server:
        limit("PACE_S", 3600.0)
        assert server.post("/act", lists)[0] == 413
        with _being_answered(server):
            stranger = threading.Thread(target=server.post, args=("/s/stranger/act", lists), daemon=True)
            stranger.start()
            stranger.join(0.5)
            assert stranger.is_alive()
        stranger.join(60)
        assert not stranger.is_alive()


def test_a_very_large_body_is_read_while_a_robot_waits_for_its_answer():
    image = np.zeros((1600, 1600, 3), np.uint8)
    with serve() as server, _being_answered(server):
        assert server.post("/s/stranger/act", build_body(image=image, instruction=None))[0] == 400


def test_large_bodies_take_turns_and_a_stop_goes_before_them(limit):
    body, answers = build_body(image=np.zeros((900, 900, 3), np.uint8)), []
    with serve() as server, socket.create_connection(("127.0.0.1", server.port), 60) as slow:
        limit("_LARGE_AT_ONCE", 0)
        senders = [
            threading.Thread(target=lambda name=name: answers.append(server.post(f"/s/{name}/act", body)[0]))
            for name in ("a", "b", "c")
        ]
        for sender in senders:
            sender.start()
        slow.sendall(LONG)
        senders[0].join(0.5)
        assert server.post("/hold")[0] == 200 and server.act()["fault"]
        assert answers == []
        limit("_LARGE_AT_ONCE", 1)
        for sender in senders:
            sender.join(60)
        assert answers == [200, 200, 200]


def test_a_large_body_waits_for_those_that_are_read_only_so_long(server, monkeypatch):
    monkeypatch.setattr("vlm_local.server.service._LARGE_BODY_WAIT_S", 0.05)
    body = build_body(image=np.zeros((900, 900, 3), np.uint8))
    with server.service.reading(2**21), server.service.reading(2**21):
        status, _, answer = server.post("/act", body)
        assert status == 503 and "2 large bodies are being read" in json.loads(answer)["error"]
        assert server.post("/act", build_body())[0] == 200
    assert server.post("/act", body)[0] == 200


def test_a_body_of_tiny_chunks_is_refused(server):
    head = b"POST /act HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    for chunks in (b"1\r\nx\r\n" * 100_000, b"1;" + b"a" * 300_000, b"0\r\n" + b"a" * 300_000):
        answer = exchange(server.port, head + chunks)
        assert answer.startswith(b"HTTP/1.1 400") and b"chunks" in answer
    body = build_body()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1000], body[1000:9000], body[9000:]))
    assert exchange(server.port, head + chunks + b"0\r\n\r\n").startswith(b"HTTP/1.1 200")
    few = head.replace(b"/act", b"/reset") + b"1\r\n{\r\n1\r\n}\r\n0\r\n\r\n"
    assert exchange(server.port, few).startswith(b"HTTP/1.1 200")


def test_what_needs_no_picture_takes_no_large_body(server):
    status, _, body = server.post("/reset", b" " * (MAX_SMALL_BODY + 1))
    assert status == 413 and f"the {MAX_SMALL_BODY} bytes" in json.loads(body)["error"]
    assert server.post("/nowhere", b" " * 1_000_000)[0] == 404
    assert server.post("/reset", b" " * 1000)[0] == 200


def test_a_stranger_costs_no_memory_and_hears_why(monkeypatch):
    monkeypatch.setattr(BUDGET, 10_000_000)  # of which it takes nothing
    with serve(settings=ServerSettings(gate=Gate("correct-horse"))) as server:
        before = psutil.Process().memory_info().rss
        strangers = [socket.create_connection(("127.0.0.1", server.port), 60) for _ in range(20)]
        part = b"x" * 7_900_000
        for stranger in strangers:
            stranger.sendall(LONG + part)
        assert psutil.Process().memory_info().rss - before < 60e6
        assert server.post("/t/correct-horse/act", build_body())[0] == 200
        for stranger in strangers:
            stranger.sendall(b"x" * 100_000)
            answer = read_answer(stranger)
            assert answer.startswith(b"HTTP/1.1 401") and b"a token is needed" in answer
            stranger.close()


def test_a_body_whose_sender_hung_up_is_let_go(server):
    def measure():
        trim_heaps()
        return psutil.Process().memory_info().rss

    before = measure()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            connection.sendall(LONG + b"x" * 7_900_000)
    until(lambda: measure() - before < 60e6)


@pytest.mark.parametrize(("name", "value"), [("vlm_local.server.connections.UNREAD_S", 0.2), slow(BUDGET, 1_000_000)])
def test_who_takes_nothing_of_its_answer_is_hung_up_on(limit, monkeypatch, name, value):
    with observe() as server:
        server.act(image=np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8))
        until(lambda: server.get("/live/frame/robot")[0] == 200)
        limit("UNREAD_S", 1000.0)
        monkeypatch.setattr(name, value)
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", server.port))
            deaf.sendall(b"GET /live/frame/robot?format=png HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: _is_open(server, deaf))
            until(lambda: server.get("/health")[0] == 200 and not _is_open(server, deaf))


def _is_open(server, client) -> bool:
    return client.getsockname() in [connection.addr for connection in list(server.http._sockets.values())]


def test_a_clock_that_is_put_right_closes_no_connection(server, monkeypatch):
    robot = HTTPConnection("127.0.0.1", server.port, timeout=60)
    robot.connect()
    robot.auto_open = False  # it shall not come back in silence
    for hours in (0, 2, -48):
        monkeypatch.setattr(
            "waitress.server.time", SimpleNamespace(time=lambda wrong=hours: time.time() + 3600 * wrong)
        )
        for _ in range(3):  # each wakes the loop, which looks for idle connections
            server.get("/health")
        robot.request("POST", "/act", build_body())
        assert robot.getresponse().read()


def test_pages_that_hang_hold_no_thread_of_a_robot(monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(Hub, "encode_frame", lambda *_: gate.wait(60) and b"")
    with observe() as server:
        pages = [
            threading.Thread(target=ask, args=(server.port, "GET", "/live/frame/robot"), daemon=True) for _ in range(60)
        ]
        for page in pages:
            page.start()
        for _ in range(5):
            server.act()
        assert server.get("/health")[0] == 200
        gate.set()
        for page in pages:
            page.join(60)


def _write_png(side) -> str:
    """A picture of 3 * side**2 bytes in a text of a few kB."""
    file = io.BytesIO()
    Image.new("RGB", (side, side)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _ask(server, path, image):
    body = json.dumps({"image": image, "instruction": "go", "proprio": None}).encode()
    status, _, answer = server.post(path, body)
    return status, answer


def test_small_files_of_large_pictures_have_a_budget_and_keep_no_other_out(monkeypatch):
    monkeypatch.setattr("vlm_local.server.service.MAX_UNPACKED", 6_000_000)
    large = _write_png(1300)
    with serve() as server, _being_answered(server):
        first = threading.Thread(target=_ask, args=(server, "/s/first/act", large))
        first.start()
        until(lambda: server.service.policies.worker.num_waiting == 1)
        status, answer = _ask(server, "/s/second/act", large)
        assert status == 503 and "large pictures" in json.loads(answer)["error"]
        robot = threading.Thread(target=_ask, args=(server, "/s/third/act", _write_png(256)))
        robot.start()
        until(lambda: server.service.policies.worker.num_waiting == 2)
        server.engine.gate.set()
        first.join(60)
        robot.join(60)
        until(lambda: _ask(server, "/s/second/act", large)[0] == 200)


def test_the_newest_pictures_of_robots_have_a_budget_and_the_largest_goes(monkeypatch):
    monkeypatch.setattr("vlm_local.server.live.MAX_FRAMES", 6_000_000)
    with observe() as server:
        for name, side in [("large", 1300), ("small", 64), ("other", 1300)]:
            assert _ask(server, f"/s/{name}/act", _write_png(side))[0] == 200
        assert server.observed.close(60)  # all was delivered
        found = {name: server.get(f"/live/frame/{name}")[0] for name in ("large", "small", "other")}
        assert found.pop("small") == 200 and sorted(found.values()) == [200, 404]
