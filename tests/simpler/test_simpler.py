"""SIMPLER's tasks as ManiSkill3 plays them, behind the command line: `bash tests/run.sh --simpler`.

They need ManiSkill3's files of them (docs/environments.md), and a Vulkan driver.
"""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from vlm_local.cli import main


def find_what_is_missing() -> str:
    if importlib.util.find_spec("mani_skill") is None:
        return "needs ManiSkill3: bash tests/run.sh --simpler"
    from mani_skill.utils.assets import is_data_source_downloaded

    names = ("bridge_v2_real2sim", "widowx250s")
    return "" if all(map(is_data_source_downloaded, names)) else f"needs {', '.join(names)}: docs/environments.md"


MISSING = find_what_is_missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING or "-")
CARROT = "widowx_carrot_on_plate"


def sim(capsys, out, *arguments) -> dict:
    """The command's last line of output, which is all that it writes there under -q."""
    common = ("sim", "-q", "--env", "simpler", "--films", 0, "--workers", 1, "--episodes", 1)
    assert main([*map(str, (*common, "--out", out, *arguments))]) == 0
    return json.loads(capsys.readouterr().out)


def read_steps(out, episode: str = f"{CARROT}-0") -> list[dict]:
    return [json.loads(line) for line in (out / "episodes" / episode / "steps.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "task", [CARROT, "widowx_spoon_on_towel", "widowx_stack_cube", "widowx_put_eggplant_in_basket"]
)
def test_the_oracle_does_each_task_in_phrases(tmp_path, capsys, task):
    told = sim(capsys, tmp_path / "run", "--policy", "oracle", "--task", task, "--seed", 1)
    assert told["success_rate"] == {task: 1.0}
    assert len(read_steps(tmp_path / "run", f"{task}-0")) == (120 if "eggplant" in task else 60)


def test_a_run_goes_on_is_filmed_and_verified(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("--policy", "oracle", "--task", CARROT)
    sim(capsys, out, *arguments, "--films", 1)
    kept = read_steps(out)
    assert sim(capsys, out, *arguments, "--episodes", 2)["episodes"] == 2
    assert read_steps(out) == kept
    assert (out / f"episodes/{CARROT}-0/film.mp4").stat().st_size > 10_000
    assert {abs(number) for line in kept for number in line["action"][:3]} == {0.0, 0.0125}
    assert kept[0]["instruction"] == "put carrot on plate"
    archive = tmp_path / "run.zip"
    assert main(["pack", str(out), "--out", str(archive)]) == 0
    assert main(["verify", str(archive)]) == 0


def test_a_study_says_what_phrases_can_do(tmp_path, capsys):
    out = tmp_path / "study"
    arguments = ("ceiling", "-q", "--env", "simpler", "--tasks", CARROT, "--episodes", 1, "--seed", 0, "--workers", 1)
    assert main([*map(str, (*arguments, "--out", out))]) == 0
    rates = json.loads(capsys.readouterr().out)["success_rate"]
    assert rates["12.5 mm, held 1"] == rates["oracle in numbers"] == 1.0
    assert rates["6.25 mm, held 1"] == rates["random"] == 0.0, "half steps are too slow for 60 of them"
    assert "| 12.5 mm, held 1 | 1 | 100.0 % |" in (out / "tables.md").read_text()


def test_what_counts_is_how_an_episode_ends(tmp_path, capsys):
    assert sim(capsys, tmp_path / "run", "--policy", "stop", "--task", CARROT)["success_rate"] == {CARROT: 0.0}
    scores = json.loads((tmp_path / "run/report.json").read_text())["tasks"][CARROT]
    assert (scores["lost"], scores["reached"]) == (1, {"grasped": 0, "placed": 0})
    assert len(read_steps(tmp_path / "run")) == 60


def test_phrases_move_the_hand_the_way_they_say_and_the_picture_shows_it(tmp_path, capsys):
    ways = {"move forward": (0, 1, 0.06), "move left": (1, 1, 0.06), "move up": (2, 1, 0.06)}
    turns = {"tilt up": (4, 1, 0.6), "rotate counterclockwise": (5, 1, 0.6)}
    seen = {}
    for phrase, (column, sign, least) in (ways | turns).items():
        out = tmp_path / phrase.replace(" ", "-")
        sim(capsys, out, "--policy", phrase, "--task", CARROT, "--max-steps", 7, "--films", 1)
        moved = np.subtract(*(read_steps(out)[step]["proprio"] for step in (-1, 0)))
        assert sign * moved[column] > least and np.abs(np.delete(moved[:3], column % 3)).max() < 0.02
        frames = read_frames(out, 0)
        seen[phrase] = frames[0].astype(int), frames[-1].astype(int)
    assert seen["move left"][0].shape == (256, 256, 3) and seen["move left"][0].std() > 20
    down, right = find_shift(*seen["move left"])
    assert right < -10 and abs(down) < 20, "left is left in the picture"
    assert find_shift(*seen["move up"])[0] < -5


def find_shift(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Rows and columns from where the dark hand was to where it is."""
    change = (last - first).sum(axis=2)
    return np.argwhere(change < -150).mean(axis=0) - np.argwhere(change > 150).mean(axis=0)


def test_an_episode_depends_on_its_seed_alone(tmp_path, capsys):
    both, alone = tmp_path / "both", tmp_path / "alone"
    arguments = ("--policy", "move forward left down", "--task", CARROT, "--max-steps", 12, "--films", 2)
    sim(capsys, both, *arguments, "--episodes", 2)
    sim(capsys, alone, *arguments, "--seed", 1)
    assert [line["proprio"] for line in read_steps(both, f"{CARROT}-1")] == [
        line["proprio"] for line in read_steps(alone)
    ]
    first, second, again = (read_frames(*run) for run in ((both, 0), (both, 1), (alone, 0)))
    np.testing.assert_array_equal(second, again)
    assert (first[0] != second[0]).any()


def read_frames(out, number: int) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted((out / f"episodes/{CARROT}-{number}/frames").glob("*.png"))]
