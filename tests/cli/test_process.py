"""How the process of a command ends."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests import recordings
from tests.documents import ROOT
from tests.slow import slow
from vlm_local.cli import main
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


def test_a_file_that_cannot_be_used_is_named_without_a_traceback(capsys):
    assert main(["runs", "a" * 300]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vlm-local runs: aaa") and error.endswith("File name too long\n")


def test_a_folder_where_a_file_is_to_be_written_is_refused_before_the_work(run, tmp_path, capsys):
    for words in (["label", str(run), "--out", str(tmp_path)], ["share", str(run / "episodes/robot-0"), "--out", "."]):
        assert main(words) == 2
        assert f"cannot write {words[-1]}: it is a folder; name a file" in capsys.readouterr().err


def test_a_disk_that_is_full_is_told_without_a_traceback(run):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vlm_local", "runs", str(run)]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE)
    assert process.returncode == 2 and re.match(rb"vlm-local.*: No space left on device\n", process.stderr)
    assert b"Traceback" not in process.stderr


def test_a_closed_output_is_no_error(run):
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        process = subprocess.run(["sh", "-c", f'exec "$0" -m vlm_local runs "$1" {closed}', sys.executable, run])
        assert process.returncode == 0


def test_what_a_terminal_has_no_letters_for_is_escaped(tmp_path):
    writer = RunWriter(tmp_path / "run", {"model": "tiny"})
    writer.start_episode("robot")
    writer.add_step({"robot": "robot", "step": 0, "instruction": "größer", "phrase": "stop"}, None)
    writer.close()
    command = [sys.executable, "-m", "vlm_local", "runs", str(tmp_path / "run")]
    process = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert process.returncode == 0 and rb"gr\xf6\xdfer" in process.stdout


def test_a_name_that_is_no_text_can_be_read_and_written(tmp_path, capsys):
    """A folder of another system's disk, in Latin-1."""
    place = tmp_path / os.fsdecode("größer".encode("latin-1"))
    recordings.write_walks(place / "data", 2, num_steps=9)
    for policy in ("stop", "random"):
        out = str(place / f"{policy}-größer".encode("latin-1").decode("utf-8", "surrogateescape"))
        assert main(["eval", "--data", str(place / "data"), "--policy", policy, "--out", out]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["out"] == out
    results = sorted(map(str, place.glob("*-*")))
    assert main(["compare", *results, "--out", str(place / "compared")]) == 0


def test_another_python_than_the_projects_is_told_which_to_use(run):
    """-S: without the virtual environment's packages."""
    command = [sys.executable, "-S", "-m", "vlm_local", "runs", str(run)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PATH": os.environ["PATH"]})
    assert process.returncode == 2 and "run .venv/bin/python" in process.stderr and "Traceback" not in process.stderr


SWALLOWED = """
import signal, sys
from vlm_local.cli import models, start

def run(args):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise ImportError("initialization failed")

models._list_models = run
sys.argv = ["vlm-local", "models"]
signal.signal(signal.SIGINT, signal.default_int_handler)
start()
"""


def test_ctrl_c_is_one_also_where_a_library_makes_an_error_of_it():
    process = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True)
    assert process.returncode == 130 and process.stderr == "\nvlm-local models: stopped\n"


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
        ("raise KeyboardInterrupt", 130, ""),
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
