"""LIBERO's own package behind the command line: `bash tests/run.sh --libero`."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from vlm_local.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libero") is None, reason="needs LIBERO: bash tests/run.sh --libero"
)


def sim(capsys, out, *arguments) -> dict:
    """The command's last line of output, which is all that it writes there under -q."""
    common = ("sim", "-q", "--env", "libero", "--films", 0, "--workers", 1, "--episodes", 1)
    assert main([*map(str, (*common, "--out", out, *arguments))]) == 0
    return json.loads(capsys.readouterr().out)


def read_steps(out, episode: str = "libero_object-9-0") -> list[dict]:
    return [json.loads(line) for line in (out / "episodes" / episode / "steps.jsonl").read_text().splitlines()]


def test_the_oracle_plays_films_resumes_and_is_verified(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("--policy", "oracle", "--task", "libero_object/9")
    told = sim(capsys, out, *arguments, "--films", 1)
    assert told["success_rate"] == {"libero_object/9": 1.0} and told["max_steps"] == 280
    kept = read_steps(out)
    assert sim(capsys, out, *arguments, "--episodes", 2)["episodes"] == 2
    assert read_steps(out) == kept
    assert (out / "episodes/libero_object-9-0/film.mp4").stat().st_size > 10_000
    assert {abs(number) for line in kept for number in line["action"][:3]} == {0.0, 0.0125}
    assert {line["action"][6] for line in kept} == {0.0, 1.0}
    assert kept[0]["instruction"] == "pick up the orange juice and place it in the basket"
    archive = tmp_path / "run.zip"
    assert main(["pack", str(out), "--out", str(archive)]) == 0
    assert main(["verify", str(archive)]) == 0


def test_phrases_move_the_hand_the_way_they_say_and_the_picture_shows_it(tmp_path, capsys):
    ways = {"move forward": (0, 1, 0.06), "move left": (1, 1, 0.06), "move down": (2, -1, 0.06)}
    turns = {"tilt up": (4, 1, 0.15), "rotate counterclockwise": (5, 1, 0.15)}
    seen = {}
    for phrase, (column, sign, least) in (ways | turns).items():
        out = tmp_path / phrase.replace(" ", "-")
        sim(capsys, out, "--policy", phrase, "--task", "libero_object/9", "--max-steps", 9, "--films", 1)
        places = [line["proprio"] for line in read_steps(out)]
        moved = np.subtract(places[-1], places[0])
        assert sign * moved[column] > least and np.delete(moved[:3], column % 3).max() < 0.05
        frames = sorted((out / "episodes/libero_object-9-0/frames").glob("*.png"))
        seen[phrase] = [np.asarray(Image.open(frame), int) for frame in (frames[0], frames[-1])]
    first, last = seen["move forward"]
    assert first.shape == (256, 256, 3) and first.std() > 20
    assert find_shift(first, last)[0] > 5, "forward is down in the picture"
    assert find_shift(*seen["move left"])[1] < -5, "left is left: a mirrored view"


def find_shift(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Rows and columns from what became darker to what became brighter: the hand is brighter than the floor."""
    change = (last - first).sum(axis=2)
    return np.argwhere(change > 150).mean(axis=0) - np.argwhere(change < -150).mean(axis=0)


def test_an_episode_depends_on_its_seed_alone(tmp_path, capsys):
    both, alone = tmp_path / "both", tmp_path / "alone"
    arguments = ("--policy", "move right down", "--task", "libero_spatial/7", "--max-steps", 15)
    sim(capsys, both, *arguments, "--episodes", 2)
    sim(capsys, alone, *arguments, "--seed", 1)
    last, first = read_steps(both, "libero_spatial-7-1"), read_steps(alone, "libero_spatial-7-0")
    assert [line["proprio"] for line in last] == [line["proprio"] for line in first]
    assert first[0]["proprio"] != read_steps(both, "libero_spatial-7-0")[0]["proprio"]


def test_a_suite_stands_for_its_ten_tasks(tmp_path, capsys):
    told = sim(capsys, tmp_path / "run", "--policy", "stop", "--task", "libero_object", "--max-steps", 1)
    assert list(told["success_rate"]) == [f"libero_object/{index}" for index in range(10)]
