"""Ctrl-C in the middle of a long command, as a terminal sends it: to the command and all its processes."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil
import pytest

from tests import recordings
from tests.serving import until
from tests.slow import slow
from vlm_local.cli import main

LATEST_S = 20.0  # for 2 s on an idle machine; RemotePolicy alone would wait for 30 s


@pytest.fixture(scope="module")
def silent_server():
    """URL of a server that takes every request and never answers /act; event: the first of them is there."""
    listener, asked = socket.create_server(("127.0.0.1", 0)), threading.Event()
    kept = []

    def serve(connection):
        while data := connection.recv(1 << 16):
            if data.startswith(b"POST /act"):
                asked.set()
            elif data.startswith((b"GET", b"POST /reset")):
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            kept.append(connection)
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    listener.close()


def start(*arguments) -> subprocess.Popen:
    # Who runs the tests in the background has told them to ignore Ctrl-C, and they would hand that on.
    hear = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    )
    command = [sys.executable, "-c", hear, sys.executable, "-m", "vlm_local", *map(str, arguments)]
    path = os.pathsep.join(p for p in sys.path if p)
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def interrupt(process: subprocess.Popen) -> str:
    """What it says after Ctrl-C, once it and all its processes have ended."""
    try:
        begun = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=LATEST_S)
        print(f"ended after {time.monotonic() - begun:.2f} s", error[-600:])
        assert process.returncode == 130
        until(lambda: not is_any_left(process.pid), LATEST_S)
    finally:
        if is_any_left(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    return error


def is_any_left(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def data_set(tmp_path):
    recordings.write_walks(tmp_path / "data", 1, num_steps=10)
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("command", "goes_on"),
    [
        ("sim --task reach", "the same command goes on from here"),
        slow("spatial --scenes 2 --level easy", "the same command goes on from here"),
        slow("eval --data DATA --workers 2", "the same command goes on from here"),
    ],
)
def test_while_a_server_does_not_answer(command, goes_on, silent_server, data_set, tmp_path):
    url, asked = silent_server
    asked.clear()
    words = [str(data_set) if word == "DATA" else word for word in command.split(" ")]
    process = start(*words, "--policy", url, "--out", tmp_path / "out")
    until(lambda: asked.is_set() or process.poll() is not None)
    error = interrupt(process)
    assert error.splitlines()[-1] == f"vlm-local {words[0]}: stopped; {goes_on}"
    assert "Traceback" not in error


def test_a_command_that_keeps_nothing_ends_as_soon(silent_server):
    url, asked = silent_server
    asked.clear()
    process = start("doctor", url)
    until(lambda: asked.is_set() or process.poll() is not None)
    assert interrupt(process).splitlines() == ["", "vlm-local doctor: stopped"]


IGNORING = """
import os, signal, time
from vlm_local import interrupts

interrupts._GRACE_S = 0
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *_: None)
interrupts.InterruptWatch("stopped").start()
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.2)
"""


def test_an_interrupt_that_is_to_be_ignored_ends_nothing_nor_does_another_signal():
    """As of a command that a script has put into the background."""
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run([sys.executable, "-c", IGNORING], capture_output=True, env={**os.environ, "PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
def test_while_episodes_of_a_ceiling_are_played(tmp_path):
    process = start("ceiling", "--tasks", "reach", "--level", "easy", "--workers", 2, "--out", tmp_path / "out")
    until(lambda: (tmp_path / "out" / "rows.jsonl").exists() or process.poll() is not None)
    error = interrupt(process)
    assert error.splitlines()[-1] == "vlm-local ceiling: stopped; the same command goes on from here"
    assert "Traceback" not in error


def kill_helpers(process):
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            if any("spawn_main" in word for word in child.cmdline()):
                child.kill()


@pytest.mark.long
def test_a_helper_that_is_killed_ends_the_command_with_a_sentence(tmp_path):
    process = start("ceiling", "--tasks", "reach", "--level", "easy", "--workers", 2, "--out", tmp_path / "out")
    until(lambda: process.poll() is not None or kill_helpers(process))
    _, error = process.communicate()
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith("vlm-local ceiling: a process of this command was killed")
    until(lambda: not is_any_left(process.pid))


@pytest.mark.slow
def test_helpers_end_with_a_command_that_is_killed(tmp_path):
    process = start("ceiling", "--tasks", "reach", "--level", "easy", "--workers", 2, "--out", tmp_path / "out")
    until(lambda: (tmp_path / "out" / "rows.jsonl").exists() or process.poll() is not None)
    process.kill()
    process.communicate()
    until(lambda: not is_any_left(process.pid))


@pytest.mark.long
def test_while_the_frames_of_a_round_are_collected(tmp_path):
    process = start("train", "tiny", "--task", "lift", "--rounds", 2, "--out", tmp_path / "run")
    until(lambda: (tmp_path / "run" / "shards").exists() or process.poll() is not None)
    error = interrupt(process)
    assert error.splitlines()[-1] == "vlm-local train: stopped; the same command goes on from the last finished round"
    assert "Traceback" not in error


@pytest.mark.long
def test_while_a_model_is_tuned(tmp_path, data_set):
    assert main(["train", "init-tiny", "--out", str(tmp_path / "tiny")]) == 0
    flags = ("--model", tmp_path / "tiny", "--data", data_set, "--out", tmp_path / "out", "--samples", 64)
    process = start("train", "finetune", *flags)
    until(lambda: (tmp_path / "out" / "training" / "settings.json").exists() or process.poll() is not None)
    error = interrupt(process)
    assert error.splitlines()[-1] == "vlm-local train: stopped; the same command goes on from the last saved step"
    assert "Traceback" not in error
