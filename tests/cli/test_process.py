"""How the process of a command ends."""

import os
import subprocess
import sys

import pytest

from tests.slow import slow
from vlm_local.data.runs import RunWriter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "run"
    writer = RunWriter(folder, {"model": "tiny"})
    writer.start_episode("robot")
    for step in range(9):
        writer.add_step({"robot": "robot", "step": step, "instruction": "go", "phrase": "stop"}, None)
    writer.close()
    return folder


@pytest.mark.parametrize(
    ("command", "both", "buffered"),
    [
        (["runs", "RUN"], True, False),
        (["models"], False, True),
        slow(["replay", "RUN", "--policy", "stop"], False, False),
        slow(["replay", "RUN", "--policy", "stop"], True, True),
    ],
)
def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(run, command, both, buffered):
    """As `| head -1` and `2>&1 | head -1` do. Without a buffer the first line meets the closed pipe, else the last."""
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.run(
        [sys.executable, "-m", "vlm_local", *(str(run) if word == "RUN" else word for word in command)],
        stdout=writing,
        stderr=writing if both else subprocess.PIPE,
        env=os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"},
        text=True,
    )
    os.close(writing)
    assert process.returncode == 141 and not process.stderr


def test_help_that_nobody_reads_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vlm_local", "--help"]
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert process.returncode in (0, 141) and not process.stderr


STUCK = """
import sys, threading
from vlm_local import cli

def main():
    print("said")
    {end}

cli.main = main
threading.Thread(target=threading.Event().wait, name="engine", daemon=True).start()
cli.start()
raise AssertionError("the process should have ended")
"""


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        ("return 0", 0, ""),
        ("return 2", 2, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise ValueError('broken')", 1, "broken"),
    ],
)
def test_a_model_that_still_works_does_not_keep_the_process_from_its_end(end, status, says):
    process = subprocess.run([sys.executable, "-c", STUCK.format(end=end)], capture_output=True, text=True)
    assert process.returncode == status and process.stdout == "said\n" and says in process.stderr


TORCH = """
import sys, threading, time, torch
from vlm_local import cli

matrix, started = torch.randn(900, 900), threading.Event()

def multiply():
    while True:
        torch.mm(matrix, matrix)
        started.set()

cli.main = lambda: started.wait() and 0
threading.Thread(target=multiply, name="engine", daemon=True).start()
cli.start()
"""


@pytest.mark.slow
def test_a_forward_that_still_runs_does_not_abort_the_process():
    """The interpreter's own end calls C++'s terminate where a thread comes back from torch."""
    process = subprocess.run([sys.executable, "-c", TORCH], capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
