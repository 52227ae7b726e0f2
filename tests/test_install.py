"""deploy/venv.sh makes the virtual environment of run_server.sh and of the tests. pip is a stand-in: the real one takes
minutes and two gigabytes."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.serving import until

ROOT = Path(__file__).parent.parent
# `-m venv FOLDER` makes FOLDER/bin/python, which is the same script. `pip install` tells of its begin and end in `log`,
# and ends once there is a file `go`. pip is there once `-m venv` has come to its end.
STAND_IN = """#!/usr/bin/env bash
set -eu
if [ "$2" = venv ]; then
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    [ ! -e no-pip ] || exit 1
    touch "$3/bin/pip"
    exit
fi
[ -e "$(dirname "$0")/pip" ] || exit 1
[ "$4" = --help ] && exit
echo "begin ${@: -1}" >>log
until [ -e go ]; do sleep 0.02; done
echo "end ${@: -1}" >>log
"""


@pytest.fixture
def clone(tmp_path):
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy/venv.sh", tmp_path / "deploy")
    for name in ("setup.cfg", "setup.py"):
        (tmp_path / name).write_text("")
    stand_in = tmp_path / "programs/python3"
    stand_in.parent.mkdir()
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return tmp_path


def start(clone, extras="", then="true"):
    """`then` runs in place of the shell, as the server does."""
    environ = os.environ | {"PATH": f"{clone}/programs:{os.environ['PATH']}"}
    environ.pop("VLM_LOCAL_VENV", None)
    return subprocess.Popen(
        ["bash", "-c", f"set -euo pipefail; source deploy/venv.sh '{extras}'; exec {then}"],
        cwd=clone,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=(clone / "stderr").open("a"),
        start_new_session=True,
    )


def log(clone):
    return (clone / "log").read_text().splitlines() if (clone / "log").exists() else []


def said(clone):
    return (clone / "stderr").read_text()


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_is_made_once(clone):
    (clone / "go").touch()
    for _ in range(2):
        assert start(clone).wait(timeout=60) == 0
    assert log(clone) == ["begin .", "end ."]


@pytest.mark.skipif(shutil.which("flock") is None, reason="there is no flock")
def test_two_first_installs_take_turns(clone):
    first = start(clone)
    until(lambda: log(clone) == ["begin ."])
    second, third = start(clone, "test"), start(clone)
    until(lambda: said(clone).count("Another install into .venv is running; waiting for it to end") == 2)
    (clone / "go").touch()
    assert [process.wait(timeout=60) for process in (first, second, third)] == [0, 0, 0]
    assert log(clone) == ["begin .", "end .", "begin .[test]", "end .[test]"]


def test_what_runs_after_the_install_does_not_hold_its_lock(clone):
    (clone / "go").touch()
    server = start(clone, then="sleep 60")
    try:
        until(lambda: Path(f"/proc/{server.pid}/comm").read_text() == "sleep\n")
        assert start(clone, "test").wait(timeout=60) == 0
    finally:
        kill(server)
    assert log(clone)[2:] == ["begin .[test]", "end .[test]"]
    assert "waiting" not in said(clone)


def test_an_install_that_was_killed_is_done_again_and_says_so(clone):
    killed = start(clone)
    until(lambda: log(clone) == ["begin ."])
    kill(killed)
    (clone / "go").touch()
    assert start(clone).wait(timeout=60) == 0
    assert log(clone) == ["begin .", "begin .", "end ."]
    assert said(clone).count("The last install into .venv did not finish; installing again.") == 1
    assert "waiting" not in said(clone)
    assert start(clone, "test").wait(timeout=60) == 0
    assert said(clone).count("did not finish") == 1


def test_an_environment_that_got_no_pip_is_made_again(clone):
    (clone / "go").touch()
    (clone / "no-pip").touch()  # Debian without python3-venv
    assert start(clone).wait(timeout=60) != 0
    assert log(clone) == []
    (clone / "no-pip").unlink()
    assert start(clone).wait(timeout=60) == 0
    assert log(clone) == ["begin .", "end ."]


def test_the_project_is_installed_again_where_the_python_is_gone(clone):
    (clone / "go").touch()
    assert start(clone).wait(timeout=60) == 0
    (clone / ".venv/bin/python").unlink()
    assert start(clone).wait(timeout=60) == 0
    assert log(clone) == ["begin .", "end ."] * 2
