"""A relay before a real server, through a tunnel that drops."""

import http.client
import json
import re
import select
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.serving import ask, build_body, serve, until
from vlm_local import relay as relay_file
from vlm_local.cli import main
from vlm_local.errors import EngineError
from vlm_local.lab.station.run import JobPlan, run_job
from vlm_local.lab.station.way import Link
from vlm_local.relay import HEADER, Relay
from vlm_local.server.records import StepRecord
from vlm_local.server.repeats import Repeats
from vlm_local.server.service import ServerSettings

ACT = "/act?details=1"
SMALL_BODY = build_body(image=np.zeros((16, 16, 3), np.uint8))


@contextmanager
def run_relay(port, hold_s=30.0):
    relay = Relay(("127.0.0.1", port), ("127.0.0.1", 0), hold_s)
    thread = threading.Thread(target=relay.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield relay
    finally:
        relay.shutdown()
        thread.join()
        relay.server_close()


@contextmanager
def relay_to(port, hold_s=30.0):
    with run_relay(port, hold_s) as relay:
        yield relay.server_port


@pytest.fixture
def way():
    """server, link and the relay's port: a station asks the relay, which asks the server through the link."""
    with (
        serve() as server,
        closing(Link(("127.0.0.1", server.port))) as link,
        relay_to(link.port) as port,
    ):
        yield server, link, port


def _act(connection, **fields):
    connection.request("POST", ACT, build_body(**fields))
    response = connection.getresponse()
    body = response.read()
    assert response.status == 200, body
    return json.loads(body)


def _count_steps(server):
    server.newest_record()
    return sum(isinstance(record, StepRecord) for record in server.records)


def test_each_station_keeps_its_episode_over_its_own_connection(way):
    server, _, port = way
    first, second = (http.client.HTTPConnection("127.0.0.1", port, timeout=60) for _ in range(2))
    with closing(first), closing(second):
        answers = [_act(each, instruction="open the drawer") for each in (first, second, first, second)]
    assert [(each["robot"], each["step"]) for each in answers] == [
        *(("robot", 0), ("robot.2", 0), ("robot", 1), ("robot.2", 1)),
    ]
    for step in range(3):  # a client with a connection for each request
        answer = json.loads(ask(port, "POST", ACT, build_body(instruction="close the drawer"))[2])
        assert answer["step"] == step
    assert _count_steps(server) == 7


def test_an_answer_that_a_drop_swallowed_is_given_again_and_no_step_is_taken_twice(way):
    server, link, port = way
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as station:
        assert _act(station)["step"] == 0
        server.engine.gate.clear()
        asked = threading.Thread(target=lambda: answers.append(_act(station)))
        answers = []
        asked.start()
        until(lambda: len(server.engine.requests) == 2)
        link.break_down(1.5)
        server.engine.gate.set()
        until(lambda: _count_steps(server) == 2)  # done, and nobody there to hear of it
        assert not answers
        asked.join(30)
        assert (answers[0]["step"], answers[0]["episode"]) == (1, 0)
        assert (_act(station)["step"], _count_steps(server)) == (2, 3)


def test_a_repeat_waits_for_the_first_that_is_still_under_way(way, monkeypatch, capfd):
    monkeypatch.setattr("vlm_local.relay._PROBE_EVERY_S", 0.05)
    server, link, port = way
    answers = []
    server.engine.gate.clear()
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as station:
        asked = threading.Thread(target=lambda: answers.append(_act(station)))
        asked.start()
        until(lambda: len(server.engine.requests) == 1)
        link.break_down(0.2)
        time.sleep(1)
        assert not answers
        server.engine.gate.set()
        asked.join(30)
    assert (answers[0]["step"], _count_steps(server), len(server.engine.requests)) == (0, 1, 1)
    assert float(re.search(r"is answered after ([\d.]+) s", capfd.readouterr().err)[1]) >= 1  # all of it


@pytest.mark.slow
def test_a_job_survives_a_tunnel_that_is_gone_for_a_while(way, tmp_path):
    server, link, port = way
    breaks = threading.Thread(target=lambda: (until(lambda: len(server.records) > 14), link.break_down(3.0)))
    breaks.start()
    plan = JobPlan(f"http://127.0.0.1:{port}", "open_drawer", episodes=2, max_steps=12, test_every=0)
    report = run_job(plan, tmp_path / "job")
    breaks.join()
    assert report["would_have_ended"] == [] and report["answer_ms"]["max"] > 1000
    assert _count_steps(server) == 24
    assert {record.about["episode"] for record in server.records} == {0, 1}


def test_the_file_alone_hides_a_silence(tmp_path):
    """Copied, in an interpreter without packages; a silence is noticed by asking, sooner here, as nothing ends."""
    asks, sooner = "_PROBE_EVERY_S, _PROBE_S = 5.0, 2.0", "_PROBE_EVERY_S, _PROBE_S = 0.5, 1.0"
    text = Path(relay_file.__file__).read_text()
    assert asks in text
    (tmp_path / "relay.py").write_text(text.replace(asks, sooner))
    with serve() as server, closing(Link(("127.0.0.1", server.port))) as link:
        url = f"http://127.0.0.1:{link.port}"
        command = [sys.executable, "-I", "-S", str(tmp_path / "relay.py"), url, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            try:
                address = process.stdout.readline().split()[1]
                assert address.startswith("http://127.0.0.1:")
                with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)) as station:
                    _act(station)
                    link.fall_silent(2)
                    began = time.monotonic()
                    assert _act(station)["step"] == 1
                    assert 1 < time.monotonic() - began < 20
            finally:
                process.terminate()
                process.wait(30)
        assert _count_steps(server) == 2


def test_a_tunnel_that_stays_down_is_told_after_the_time(capfd):
    tries = []

    def drop():
        with suppress(OSError):
            while True:
                tries.append(down.accept()[0].close())

    with socket.create_server(("127.0.0.1", 0)) as down, relay_to(down.getsockname()[1], hold_s=0.6) as port:
        threading.Thread(target=drop, daemon=True).start()
        status, _, body = ask(port, "POST", ACT, SMALL_BODY)
    assert status == 504 and b"could not be reached" in body
    assert "/act?details=1 is held" in capfd.readouterr().err
    assert len(tries) <= 4  # with pauses


def test_a_tunnel_that_stays_silent_is_told_after_the_time(monkeypatch):
    _probe_often(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as silent, relay_to(silent.getsockname()[1], hold_s=0.3) as port:
        assert ask(port, "POST", ACT, SMALL_BODY)[0] == 504


def test_a_request_is_sent_again_where_its_connection_stays_silent_and_the_tunnel_is_back(monkeypatch):
    """As where a router on the way has forgotten the connection."""
    _probe_often(monkeypatch)
    probes, came, is_over = [], [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            probes.append(self.path)
            if len(probes) > 1:
                self._answer()

        def do_POST(self):
            came.append(self.headers[HEADER])
            self.rfile.read(int(self.headers["Content-Length"]))
            if len(came) > 1:
                self._answer()
            else:
                is_over.wait(60)

        def _answer(self):
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with relay_to(server.server_port) as port:
            assert ask(port, "POST", ACT, build_body())[0] == 200
        is_over.set()
        server.shutdown()
    assert len(came) == 2 and came[0] == came[1]


@pytest.mark.slow
def test_a_hold_begins_when_the_tunnel_last_worked(way, monkeypatch):
    """A model that takes its time leaves as much for a drop."""
    _probe_often(monkeypatch)
    server, link, _ = way
    answers = []
    server.engine.gate.clear()
    with relay_to(link.port, hold_s=1.0) as port:
        asked = threading.Thread(target=lambda: answers.append(ask(port, "POST", ACT, build_body())[0]))
        asked.start()
        until(lambda: len(server.engine.requests) == 1)
        time.sleep(1.1)
        link.break_down(0.1)
        server.engine.gate.set()
        asked.join(60)
    assert answers == [200]


def test_what_a_server_refuses_is_passed_on_at_once():
    """Only a server that will come back is asked again."""
    with serve(settings=ServerSettings(on_fault="error", rate_limit=1)) as server, relay_to(server.port) as port:
        server.engine.fault = RuntimeError("out of memory")
        assert ask(port, "POST", ACT, build_body())[0] == 503
        assert len(server.engine.requests) == 1


def _probe_often(monkeypatch):
    monkeypatch.setattr("vlm_local.relay._PROBE_EVERY_S", 0.05)
    monkeypatch.setattr("vlm_local.relay._PROBE_S", 0.2)


def test_only_what_a_station_asks_is_passed_on(way):
    _, _, port = way
    assert ask(port, "POST", "/hold", b"")[0] == 404
    assert ask(port, "GET", "/")[0] == 404
    assert ask(port, "POST", "/s/left/act?details=1", build_body())[0] == 200
    assert json.loads(ask(port, "GET", "/health")[2])["status"] == "healthy"
    for too_many in ("999999999999", "200000000"):
        assert ask(port, "POST", "/act", b"", {"Content-Length": too_many})[0] == 413
    assert (
        ask(port, "POST", "/act", build_body(), {"Origin": "http://elsewhere.example"})[0] == 403
    )  # as the server says


def _ends(connection, seconds):
    """Whether the other side ends a connection within this time."""
    connection.settimeout(seconds)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_who_sends_nothing_or_too_slowly_is_cut_off_and_a_station_may_rest(way, monkeypatch):
    monkeypatch.setattr("vlm_local.relay.FIRST_S", 0.5)
    _, _, port = way
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as station:
        assert _act(station)["step"] == 0
        silent, slow = (socket.create_connection(("127.0.0.1", port)) for _ in range(2))
        with silent, slow:
            slow.sendall(b"POST /act HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
            assert _ends(silent, 10) and _ends(slow, 10)
        assert _act(station)["step"] == 1  # over the same connection


def test_where_all_places_are_taken_the_silent_make_room_and_a_station_keeps_its_own(monkeypatch):
    monkeypatch.setattr("vlm_local.relay.MAX_CONNECTIONS", 4)
    monkeypatch.setattr("vlm_local.relay.FIRST_S", 120)  # they do not end because this is over
    with serve() as server, relay_to(server.port) as port, ExitStack() as stack:
        station = stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)))
        assert _act(station)["step"] == 0
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(8)]
        until(lambda: sum(_ends(each, 0.01) for each in strangers) == 5)  # three of them have a place
        assert _act(station)["step"] == 1
        assert ask(port, "POST", "/s/second/act", build_body())[0] == 200  # another station gets one


def test_a_station_whose_request_is_here_keeps_its_connection(monkeypatch):
    """However long the model takes, and however many come meanwhile."""
    monkeypatch.setattr("vlm_local.relay.MAX_CONNECTIONS", 1)
    monkeypatch.setattr("vlm_local.relay._TRANSFER_S", 0.3)
    answers = []
    with serve() as server, relay_to(server.port) as port, ExitStack() as stack:
        server.engine.gate.clear()
        asked = threading.Thread(target=lambda: answers.append(ask(port, "POST", ACT, SMALL_BODY)[0]))
        asked.start()
        until(lambda: len(server.engine.requests) == 1)
        strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2)]
        assert all(_ends(each, 10) for each in strangers)
        time.sleep(0.4)
        server.engine.gate.set()
        asked.join(60)
    assert answers == [200]


def test_the_station_that_has_rested_longest_makes_room(monkeypatch):
    monkeypatch.setattr("vlm_local.relay.MAX_CONNECTIONS", 2)
    with serve() as server, run_relay(server.port) as relay, ExitStack() as stack:
        first, second, third = (
            stack.enter_context(closing(http.client.HTTPConnection("127.0.0.1", relay.server_port, timeout=60)))
            for _ in range(3)
        )
        for station in (second, first, second, third):
            _act(station)
            until(lambda: all(handler.is_resting() for handler in relay.handlers))  # its thread ends after the answer
        assert _ends(first.sock, 10)
        assert _act(second)["step"] == 2


def test_requests_that_never_end_keep_no_station_out(monkeypatch):
    monkeypatch.setattr("vlm_local.relay.MAX_CONNECTIONS", 4)
    with serve() as server, relay_to(server.port) as port, ExitStack() as stack:
        for _ in range(8):
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            stranger.sendall(b"POST /act HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        assert ask(port, "POST", "/act", build_body())[0] == 200


def test_large_bodies_have_two_places_and_keep_no_station_out(way):
    _, _, port = way
    head = b"POST /act HTTP/1.1\r\nContent-Length: 9000000\r\n\r\n"
    with ExitStack() as stack:
        large = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60)) for _ in range(5)]
        for stranger in large:
            stranger.sendall(head)
        until(lambda: len(select.select(large, [], [], 0)[0]) == 3)
        refused = select.select(large, [], [], 0)[0]
        assert all(_ends_with_503(each) and b"bodies above" in _read_all(each) for each in refused)  # to its end
        assert ask(port, "POST", "/act", build_body())[0] == 200
        assert len(select.select(large, [], [], 0)[0]) == 3  # and no more of them
    until(lambda: _is_taken(port, head))  # the places are free again


def _ends_with_503(connection):
    connection.settimeout(1)
    try:
        return connection.recv(12) == b"HTTP/1.1 503"
    except TimeoutError:
        return False


def _is_taken(port, head):
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(head)
        return not _ends_with_503(connection)


@pytest.mark.parametrize(
    ("line", "status"),
    [
        (b"POST /\x7f/act HTTP/1.1\r\nContent-Length: 0", b"404"),
        (b"POST /\xe4/act HTTP/1.1\r\nContent-Length: 0", b"404"),
        (b"POST /act HTTP/1.1\r\nContent-Length: \xb2", b"413"),
        (b"POST /act HTTP/1.1\r\nContent-Length: " + b"0" * 5000, b"413"),
        (b"POST /act HTTP/1.1\r\nTransfer-Encoding: chunked", b"413"),
    ],
)
def test_what_cannot_be_passed_on_is_refused_at_once(way, line, status):
    """A body that was not read is not taken for the next request."""
    _, _, port = way
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(line + b"\r\n\r\nPOST /reset HTTP/1.1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        answers = _read_all(connection)
    assert answers.startswith(b"HTTP/1.1 " + status)
    assert answers.count(b"HTTP/1.1 ") == (1 if status == b"413" else 2)


def _read_all(connection):
    """Until the other side ends it."""
    data = b""
    with suppress(ConnectionError):
        while more := connection.recv(4096):
            data += more
    return data


def test_half_a_request_is_not_passed_on(way):
    _, _, port = way
    assert json.loads(ask(port, "POST", ACT, build_body())[2])["step"] == 0
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"POST /reset HTTP/1.1\r\nContent-Length: 9\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert _read_all(connection) == b""
    answer = json.loads(ask(port, "POST", ACT, build_body())[2])
    assert (answer["episode"], answer["step"]) == (0, 1)


def test_a_server_that_is_started_again_does_not_end_a_job():
    with serve() as first, closing(Link(("127.0.0.1", first.port))) as link, relay_to(link.port) as port:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as station:
            assert _act(station)["step"] == 0
            first.service.stopping.set()
            answers = []
            asking = threading.Thread(target=lambda: answers.append(_act(station)))
            asking.start()
            asking.join(0.5)
            assert asking.is_alive()
            first.service.stopping.clear()  # as if another had come
            asking.join(60)
        assert answers[0]["step"] == 1


def test_a_server_that_stays_away_is_told_in_its_own_words():
    with serve() as server, relay_to(server.port, hold_s=0.5) as port:
        server.service.stopping.set()
        status, _, body = ask(port, "POST", ACT, build_body())
        assert status == 503 and b"is stopping" in body


def test_a_number_stands_for_one_request(caplog):
    caplog.set_level("INFO")
    mark = {HEADER: "a1-7"}
    with serve() as server:
        first = server.post(ACT, build_body(), mark)
        assert "phrase=" in caplog.text and "repeated" not in caplog.text
        assert server.post(ACT, build_body(), mark)[2] == first[2]
        assert "repeated=True" in caplog.text
        assert _count_steps(server) == 1
        assert server.post(ACT, build_body(instruction="another"), mark)[0] == 409
        assert server.post(ACT, build_body(), {HEADER: "a1-6"})[0] == 409
        assert [
            server.post(ACT, build_body(), {HEADER: wrong})[0] for wrong in ("a1", "-1", "a-x", "a" * 17 + "-1")
        ] == [400] * 4
        assert json.loads(server.post("/reset", b"", {HEADER: "a1-8"})[2])["episode"] == 1
        assert json.loads(server.post("/reset", b"", {HEADER: "a1-8"})[2])["episode"] == 1
        assert json.loads(server.post(ACT, build_body(), {HEADER: "a1-9"})[2])["step"] == 0


def test_what_failed_is_tried_again():
    with serve(settings=ServerSettings(on_fault="error")) as server:
        assert server.post(ACT, b"{", {HEADER: "a1-1"})[0] == 400
        server.engine.fault = EngineError("out of memory")
        assert server.post(ACT, build_body(), {HEADER: "a1-2"})[0] == 503
        server.engine.fault = None
        assert server.post(ACT, build_body(), {HEADER: "a1-2"})[0] == 200


def test_the_store_has_an_end():
    with serve() as server:
        for number in range(70):
            assert server.post(ACT, build_body(), {HEADER: f"{number:x}-1"})[0] == 200
        assert _count_steps(server) == 70
        assert server.post(ACT, build_body(), {HEADER: "7-1"})[0] == 200  # still there
        assert _count_steps(server) == 70
        assert server.post(ACT, build_body(), {HEADER: "0-1"})[0] == 200  # forgotten
        assert _count_steps(server) == 71


def test_what_is_under_way_is_not_forgotten_however_many_come_meanwhile():
    """Its second sending would move the arm a second time."""
    repeats = Repeats(most=1, most_waiting=1)
    under_way, _ = repeats.find("a1-1", None)
    with under_way.turn:
        others = [repeats.find(f"b{number}-1", None)[0] for number in range(3)]
        assert repeats.find("a1-1", None)[0] is under_way
    assert repeats.find("b0-1", None)[0] is not others[0]


def test_requests_that_were_sent_again_hold_no_thread_that_a_stop_or_a_robot_needs():
    refused = []

    def send():
        status, _, answer = server.post(ACT, build_body(), {HEADER: "a1-1"})
        if status == 503:
            refused.append(answer)

    with serve(settings=ServerSettings(max_robots=2)) as server:
        server.engine.gate.clear()
        sent = [threading.Thread(target=send, daemon=True) for _ in range(20)]
        for thread in sent:
            thread.start()
        until(lambda: len(server.engine.requests) == 1 and len(refused) == 17, 20)
        assert b"sent again" in refused[0]
        assert server.post("/hold")[0] == 200
        server.engine.gate.set()
        for thread in sent:
            thread.join(60)
        assert server.post("/s/second/act", build_body())[0] == 200


def test_what_cannot_be_relayed_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for url, told in (
            (f"http://127.0.0.1:{port}", "where the relay itself would listen"),
            ("http://127.0.0.1:1", f"cannot listen on 127.0.0.1 port {port}: [Errno"),
            ("https://gate.example.org", "expected an address such as http://127.0.0.1:8001"),
            ("http://[::1", "relay: Invalid IPv6 URL"),
        ):
            assert main(["relay", url, "--port", str(port)]) == 2
            assert told in capsys.readouterr().err
