"""A wheel built from the repository, installed outside of it."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from vlm_local import __version__

ROOT = Path(__file__).parents[1]
PARTS = ("vlm_local", "grammars", "checkpoints", "setup.cfg", "setup.py", "README.md", "LICENSE")


def _run(command, cwd):
    """What it prints; with nothing of this repository on the path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The bin folder of an environment with the wheel, which finds the libraries of the one that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()  # a build leaves files beside its source
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / "source" / part)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "source"], folder)
    shutil.rmtree(folder / "source")
    _run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    _run([*pip, "--python", folder / "venv/bin/python", "install", "--no-deps", "--no-index", wheel], folder)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


@pytest.mark.long
def test_an_installed_wheel_serves_simulates_labels_and_evaluates(installed, tmp_path):
    command = installed / "vlm-local"
    where = _run([installed / "python", "-c", "import vlm_local; print(vlm_local.__file__)"], tmp_path)
    assert Path(where).is_relative_to(installed.parent)
    assert f"vlm_local {__version__}" in " ".join(_run([command, "--version"], tmp_path).split())
    told = _run([command, "demo", "--no-browser", "--port", 0, "--episodes", 1], tmp_path)
    assert json.loads(told.splitlines()[-1]) == {"episodes": 1, "succeeded": 1}
    _run([command, "sim", "--policy", "tiny", "--task", "reach", "--episodes", 1, "--out", "played"], tmp_path)
    report = (tmp_path / "played/report.html").read_text()
    assert "tiny in the simulator" in report and (tmp_path / "played/episodes/reach-0/film.mp4").exists()
    _run([command, "label", "played", "--out", "labels.jsonl"], tmp_path)
    assert "move" in (tmp_path / "labels.jsonl").read_text()
    scored = _run([command, "eval", "--data", "played", "--policy", "tiny", "--out", "scored"], tmp_path)
    assert json.loads(scored.splitlines()[-1])["episodes"] == 1
