"""`serve` as a process: what it prints, how it ends."""

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import msgpack
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.serving import ask, build_body, until
from vlm_local.logs import LineWriter

STEERED = """
import sys, time
import vlm_local.assembly as assembly
from vlm_local.cli import main

open_policies = assembly.open_policies
def slow_down(engine):
    if sys.argv[1] == "fail":
        raise MemoryError("no room")
    answer = engine.generate
    def generate(requests):
        if requests[0].episode != "warm-up":
            print("inside", flush=True)
            time.sleep(float(sys.argv[1]))
        return answer(requests)
    engine.generate = generate
    return engine
assembly.open_policies = lambda options, apart: open_policies(options, slow_down)
sys.exit(main(["serve", *sys.argv[2:]]))
"""


@pytest.fixture
def start(tmp_path):
    processes = []

    def start(*flags, seconds="0", model="move up"):
        command = [sys.executable, "-c", STEERED, seconds, "--model", model, "--port", "0", *flags]
        path = os.pathsep.join(p for p in sys.path if p)
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def _wait_ready(process) -> int:
    """The port, once it says that it is ready."""
    for line in process.stdout:
        if line.startswith("ready: "):
            return int(re.search(r":(\d+)", line.split("http")[1])[1])
    raise AssertionError(process.stderr.read())


def test_it_says_where_it_is_records_and_ends_with_0(start, tmp_path):
    process = start("--seed", "3", "--prefix", "/robots")
    port = _wait_ready(process)
    status, _, body = ask(port, "POST", "/robots/act?details=1", build_body())
    assert status == 200 and json.loads(body)["phrase"] == "move up"
    assert ask(port, "GET", "/")[0] == 200
    assert b"vlm_local_steps" in ask(port, "GET", "/metrics")[2]
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "route=/act robot=robot status=200" in log and "Traceback" not in log
    (run,) = (tmp_path / "runs").iterdir()
    lines = (run / "episodes" / "robot-0" / "steps.jsonl").read_text().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["phrase"] == "move up"


@pytest.mark.slow
def test_a_hold_and_a_closed_gripper_outlast_a_killed_server(start, tmp_path):
    def act():
        return json.loads(ask(port, "POST", "/act?details=1", build_body(proprio=None))[2])

    process = start(model="move up, close gripper")
    port = _wait_ready(process)
    assert act()["action"] == [0, 0, 0.0125, 0, 0, 0, 0]
    assert json.loads(ask(port, "POST", "/hold", b'{"reason": "tea"}')[2])["survives_restart"] is True
    process.kill()
    process.wait(60)
    second = start(model="move up")
    port = _wait_ready(second)
    told = act()
    assert told["action"] == [0] * 7 and "tea" in told["fault"]
    assert ask(port, "POST", "/release")[0] == 200
    assert act()["action"] == [0, 0, 0.0125, 0, 0, 0, 0]
    port = _wait_ready(start(model="move up"))  # beside the second, not after it: another server, other robots
    told = act()
    assert told["fault"] is None and told["action"][6] == 1


@pytest.mark.slow
def test_servers_that_start_together_record_into_folders_of_their_own(start, tmp_path):
    ports = [_wait_ready(process) for process in [start(), start()]]
    for port in ports:
        assert ask(port, "POST", "/act", build_body())[0] == 200
    until(lambda: len(list((tmp_path / "runs").glob("*/episodes/robot-0/steps.jsonl"))) == 2)


def _post_in_background(port):
    result = []
    thread = threading.Thread(target=lambda: result.extend(ask(port, "POST", "/act", build_body())))
    thread.start()
    return thread, result


def test_what_is_in_flight_at_sigterm_is_answered(start):
    process = start("--record", "off", seconds="1")
    port = _wait_ready(process)
    thread, result = _post_in_background(port)
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGTERM)
    thread.join(60)
    assert result[0] == 200
    assert process.wait(60) == 0


@pytest.mark.slow
def test_what_does_not_finish_in_four_seconds_gets_a_503_and_the_process_still_ends_with_0(start):
    process = start("--record", "off", seconds="60")
    port = _wait_ready(process)
    with socket.create_connection(("127.0.0.1", port)) as page:
        page.sendall(b"GET /live/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert page.recv(100).startswith(b"HTTP/1.1 200")
        thread, result = _post_in_background(port)
        assert process.stdout.readline() == "inside\n"
        begun_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert result[0] == 503 and "stopping" in json.loads(result[2])["error"]
        assert time.monotonic() - begun_s > 3.5
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_log_that_nobody_reads_holds_nothing_up(start):
    process = start("--record", "off")
    port = _wait_ready(process)
    fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)  # full after some thirty lines
    assert [ask(port, "POST", "/act", b"{")[0] for _ in range(100)] == [400] * 100
    assert ask(port, "POST", "/act", build_body())[0] == ask(port, "GET", "/health")[0] == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_lines_that_were_dropped_are_counted():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    lines = LineWriter(writer)
    for number in range(3000):
        lines.put(f"line {number} " + "-" * 100)
    told = []
    thread = threading.Thread(target=lambda: told.extend(os.fdopen(reader)))
    thread.start()
    lines.close()
    os.close(writer)
    thread.join(60)
    assert len(told) < 3000 and 0 < sum(int(line.split()[0]) for line in told if "dropped" in line) < 3000


@pytest.mark.slow
def test_sigint_while_it_loads(start):
    process = start("--record", "off")
    until(lambda: process.stdout.readline().startswith("loading"), 60)
    said = process.stdout.readline()
    assert re.fullmatch(r"open http://127\.0\.0\.1:\d+/ in a browser; nothing is recorded\n", said)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_load_that_fails_is_a_paragraph_and_a_2_and_leaves_no_run(start, tmp_path):
    process = start(seconds="fail")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.rstrip().splitlines()[-1] == "vlm-local serve: loading the model failed: MemoryError: no room"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_token_from_a_file_or_the_environment_is_on_no_command_line(start, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("of-the-file\n")
    by_file = start("--record", "off", "--token-file", str(tmp_path / "token"))
    monkeypatch.setenv("VLM_LOCAL_TOKEN", "of-the-environment")
    by_environment, by_both = start("--record", "off"), start("--record", "off", "--token", "of-the-flag")
    given = {by_file: "of-the-file", by_environment: "of-the-environment", by_both: "of-the-flag"}
    for process, token in given.items():
        port = _wait_ready(process)
        assert ask(port, "GET", "/metadata")[0] == 401
        assert ask(port, "GET", f"/t/{token}/metadata")[0] == 200


@pytest.mark.slow
def test_no_request_forges_a_line_of_the_log_or_puts_a_token_there(start):
    process = start("--record", "off", "--token", "verysecret1")
    port = _wait_ready(process)
    for path in ("/%0a2026-11-26%20INFO%20forged%1b[2J", "/s/robot/t/verysecret1/act", "/t/verysecret1/nothing"):
        ask(port, "GET", path)
        ask(port, "POST", path, b'{"reason": "a\\nb"}')
    ask(port, "POST", "/t/verysecret1/hold", json.dumps({"reason": "\nforged \x1b[2J"}).encode())
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert not [line for line in log.splitlines() if not re.match(r"\d{4}-\d\d-\d\d \d\d:", line)]
    assert "\x1b" not in log and "verysecret1" not in log and r"\nforged" in log


REFUSED = [
    (["--token-file", "nowhere"], "--token-file nowhere cannot be read"),
    (["--token", "long-enough", "--token-file", "x"], "give one of them"),
    (["--host", "0.0.0.0"], "--insecure"),
    (["--token", "x"], "at least 8"),
    (["--allow-from", "here"], "allow-from 'here'"),
    (["--prefix", "robots"], "--prefix must start"),
    (["--tunnel", "a b"], "user@host"),
    (["--tunnel", "me@there:65536"], "user@host"),
    (["--remote-port", "9"], "belongs to --tunnel"),
    (["--workspace", "moon"], "autoeval-sink"),
    (["--rate-limit", "0"], "--rate-limit: must be a number from 0.001"),
    (["--deadline-ms", "0"], "--deadline-ms: must be a number from 1 to"),
    (["--model", "fly"], "fly"),
]
REFUSE = """
import contextlib, io, json, sys
from vlm_local.cli import main

for flags in json.loads(sys.argv[1]):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            status = main(["serve", "--model", "move up", "--port", "0", "--record", "off", "--offline", *flags])
        except SystemExit as end:  # the parser's
            status = end.code
    print(json.dumps([status, error.getvalue()]), flush=True)
"""


def test_what_makes_no_sense_is_refused_in_a_paragraph(tmp_path):
    """All in one process, one after the other: its start is most of what each takes."""
    command = [sys.executable, "-c", REFUSE, json.dumps([flags for flags, _ in REFUSED])]
    path = os.pathsep.join(p for p in sys.path if p)
    ended = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(told) == len(REFUSED), ended.stderr
    for (flags, sentence), (status, error) in zip(REFUSED, told, strict=True):
        assert status == 2 and sentence in error and "Traceback" not in error, flags


@pytest.mark.slow
def test_a_hold_outlasts_a_model_that_cannot_be_loaded(start):
    process = start()
    assert ask(_wait_ready(process), "POST", "/hold", b"{}")[0] == 200
    process.kill()
    process.wait(60)
    start(seconds="fail").communicate(timeout=60)
    told = json.loads(ask(_wait_ready(start()), "POST", "/act?details=1", build_body())[2])
    assert "held by a person" in told["fault"]


@pytest.mark.slow
def test_a_websocket_port_that_is_taken_leaves_no_run(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start("--websocket-port", str(taken.getsockname()[1]))
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "choose another --websocket-port" in error
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start("--record", "off", "--port", str(port))
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"cannot listen on 127.0.0.1 port {port}: [Errno 98] Address already in use; choose another --port" in error


@pytest.mark.slow
def test_a_websocket_beside_http_answers_with_so_many_steps_as_a_phrase_is_held(start):
    process = start("--websocket-port", "0", "--steps-per-phrase", "3", "--record", "off")
    url = next(line for line in process.stdout if line.startswith("websocket: ")).split()[1]
    image = {b"__ndarray__": True, b"data": bytes(32 * 32 * 3), b"dtype": "|u1", b"shape": [32, 32, 3]}
    with connect(url) as client:
        assert msgpack.unpackb(client.recv())["horizon"] == 3
        client.send(msgpack.packb({"observation/image": image, "prompt": "lift the cup"}))
        assert msgpack.unpackb(client.recv())["phrases"] == ["move up"] * 3
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=30)
    assert process.wait(30) == 0
