"""A command that is refused, or whose model cannot be loaded, leaves nothing behind."""

import pytest

from tests import recordings
from vlm_local.cli import main
from vlm_local.data.runs import RunWriter

NO_MODEL = ["--policy", "nowhere"]
NO_URL = ["--engine", "openai"]
NO_GPU = ["--device", "cuda:99"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a data set and a recorded run beside it; commands run in it."""
    recordings.write_walks(tmp_path / "data", 1, num_steps=10)
    writer = RunWriter(tmp_path / "run", {})
    writer.start_episode("robot")
    writer.add_step({"robot": "robot", "step": 0, "instruction": "lift it", "phrase": "stop"}, None)
    writer.close()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--data", "../data", "--out", "results/a", *NO_MODEL],
        ["eval", "--data", "../data", "--out", "results/a", *NO_URL],
        ["eval", "--data", "../data", "--out", "results/a", *NO_GPU],
        ["eval", "--data", "../data", "--out", "results/a", "--policy", "stop", "--episode", "9"],
        ["replay", "../run", "--out", "a", "--policy", "stop", "--episode", "robot-9"],
        ["label", "../run", "--out", "a/b.jsonl", "--embodiment", "nobody"],
        ["train", "finetune", "--model", "tiny", "--data", "../data", "--out", "a", *NO_GPU],
        ["serve", "--port", "0", *NO_URL],
        ["serve", "--port", "0", "--engine-url", " , ", *NO_URL],
        ["sim", "--out", "results/a", *NO_GPU],
        ["station", "http://127.0.0.1:1", "--task", "open_drawer", "--out", "a"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_leaves_nothing(place, capsys, command):
    assert main(command) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert list(place.iterdir()) == []


def test_a_folder_that_was_there_stays(place):
    (place / "a").mkdir()
    assert main(["eval", "--data", "../data", "--out", "a", *NO_MODEL]) == 2
    assert (place / "a").is_dir()


def test_what_was_measured_before_stays(place):
    assert main(["eval", "--data", "../data", "--out", "a", "--policy", "stop"]) == 0
    before = (place / "a/rows.jsonl").read_bytes()
    assert main(["eval", "--data", "../data", "--out", "a", "--policy", "stop", "--episode", "9"]) == 2
    assert (place / "a/rows.jsonl").read_bytes() == before != b""
