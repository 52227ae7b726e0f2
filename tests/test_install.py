"""deploy/venv.sh makes the virtual environment of run_server.sh and of the tests. pip is a stand-in: the real one takes
minutes and two gigabytes."""

import configparser
import os
import re
import shutil
import signal
import subprocess
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.serving import until

ROOT = Path(__file__).parent.parent
# `-m venv FOLDER` makes FOLDER/bin/python, which is the same script. `pip install` tells of its begin and end in `log`,
# and ends once there is a file `go`. pip is there once `-m venv` has come to its end. `-c` asks for the version.
STAND_IN = """#!/usr/bin/env bash
set -eu
version=VERSION
if [ "$1" = -c ]; then echo $version; exit; fi
if [ "$1" = --version ]; then echo "Python $version.1"; exit; fi
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
    (tmp_path / "programs").mkdir()
    put_python(tmp_path, "python3", "3.11")
    return tmp_path


def put_python(clone, name, version):
    stand_in = clone / "programs" / name
    stand_in.write_text(STAND_IN.replace("VERSION", version))
    stand_in.chmod(0o755)


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


def test_a_python_that_will_do_is_looked_for(clone):
    """Ubuntu 22.04's python3 is 3.10, and pip ended with a list of all versions of transformers."""
    (clone / "go").touch()
    put_python(clone, "python3", "3.10")
    put_python(clone, "python3.12", "3.12")
    put_python(clone, "python3.13", "3.1")  # as pyenv's, which is there and does not run
    assert start(clone).wait(timeout=60) == 0
    assert "version=3.12\n" in (clone / ".venv/bin/python").read_text()


def test_where_no_python_will_do_nothing_is_begun(clone):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        put_python(clone, name, "3.14")
    assert start(clone).wait(timeout=60) == 1
    assert "runs on Python 3.11 to 3.13, and finds none here: python3 is Python 3.14.1." in said(clone)
    assert not (clone / ".venv").exists()


def test_an_environment_of_another_python_is_left_alone(clone):
    (clone / "go").touch()
    assert start(clone).wait(timeout=60) == 0
    put_python(clone, "python3", "3.10")
    shutil.copy(clone / "programs/python3", clone / ".venv/bin/python")
    (clone / "setup.cfg").write_text("# a newer one")
    assert start(clone).wait(timeout=60) == 1
    assert ".venv is of Python 3.10.1, and vlm-local runs on 3.11 to 3.13: delete .venv." in said(clone)
    assert log(clone) == ["begin .", "end ."]


def test_the_versions_of_python_are_those_that_the_dependencies_run_on():
    """As far as setup.cfg ties a dependency to versions: of others pip takes an older one."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    shell = (ROOT / "deploy/venv.sh").read_text()
    versions = re.search(r'^versions="(.*)"', shell, re.MULTILINE)[1].split()
    ours = SpecifierSet(config["options"]["python_requires"])
    assert sorted(versions) == [f"3.{minor}" for minor in range(40) if f"3.{minor}" in ours]
    lines = config["options"]["install_requires"].split("\n")
    needs = [Requirement(line) for line in lines if line and not line.startswith("#")]
    tied = [need.name for need in needs if any(part.operator in ("<", "==") for part in need.specifier)]
    assert {"transformers", "outlines", "torch"} <= set(tied)
    for name in tied:
        theirs = SpecifierSet(metadata(name)["Requires-Python"])
        assert all(f"{version}.1" in theirs for version in versions), (name, theirs)
