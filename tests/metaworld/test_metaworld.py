"""Meta-World's own package behind the command line: `bash tests/run.sh --metaworld`."""

import importlib.util
import json
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

from vlm_local.cli import main

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("metaworld") is None, reason="needs Meta-World: bash tests/run.sh --metaworld"
)


def run(capsys, *arguments) -> dict:
    """The command's last line of output."""
    assert main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def sim(capsys, out, *arguments) -> dict:
    common = ("--env", "metaworld", "--films", 0, "--workers", 1, "--episodes", 1)
    return run(capsys, "sim", *common, "--out", out, *arguments)


def test_the_oracle_plays_films_resumes_and_is_verified(tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ("--policy", "oracle", "--task", "reach-v3,handle-press-v3")
    told = sim(capsys, out, *arguments, "--films", 1)
    assert told["success_rate"] == {"reach-v3": 1.0, "handle-press-v3": 1.0} and told["max_steps"] == 500
    kept = (out / "episodes/reach-v3-0/steps.jsonl").read_bytes()
    assert sim(capsys, out, *arguments, "--episodes", 2)["episodes"] == 4
    assert (out / "episodes/reach-v3-0/steps.jsonl").read_bytes() == kept
    assert (out / "episodes/reach-v3-0/film.mp4").stat().st_size > 10_000
    frame = np.asarray(Image.open(next((out / "episodes/reach-v3-0/frames").glob("*.png"))), int)
    is_red = (frame[..., 0] > 90) & (frame[..., 1:].max(axis=2) < 60)  # the arm
    rows, columns = np.nonzero(is_red)
    assert is_red.sum() > 500 and columns.mean() < 128 and rows.min() < 128, "the arm stands upright at the left"
    lines = [json.loads(line) for line in kept.splitlines()]
    assert {abs(number) for line in lines for number in line["action"][:3]} == {0.0, 0.01}
    archive = tmp_path / "run.zip"
    assert main(["pack", str(out), "--out", str(archive)]) == 0
    assert main(["verify", str(archive)]) == 0


def test_phrases_move_the_hand_the_way_they_say(tmp_path, capsys):
    ways = {"move forward": (0, 1), "move left": (1, 1), "move down": (2, -1)}
    for phrase, (axis, sign) in ways.items():
        out = tmp_path / phrase.replace(" ", "-")
        sim(capsys, out, "--policy", phrase, "--task", "drawer-open-v3", "--max-steps", 10)
        lines = (out / "episodes/drawer-open-v3-0/steps.jsonl").read_text().splitlines()
        places = [json.loads(line)["proprio"] for line in lines]
        moved = np.subtract(places[-1], places[0])[:3]
        assert np.abs(moved).argmax() == axis and sign * moved[axis] > 0.02


def test_an_episode_is_longer_than_meta_world_allows(tmp_path, capsys):
    command = ["sim", "--env", "metaworld", "--policy", "stop", "--max-steps", "501", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    assert "has at most 500 steps" in capsys.readouterr().err


def test_the_ceiling_study_goes_on_and_writes_its_tables(tmp_path, capsys):
    out = tmp_path / "ceiling"
    command = ("ceiling", "--env", "metaworld", "--tasks", "handle-press-v3", "--workers", 1, "--out", out)
    run(capsys, *command, "--episodes", 1, "--seed", 1)
    told = run(capsys, *command, "--episodes", 2, "--seed", 1)
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == [1, 2] and all(row["steps"][:2] > [0, 0] for row in rows)
    assert told["success_rate"]["10 mm, held 1, effort 0.6"] == told["success_rate"]["expert"] == 1.0
    assert told["success_rate"]["random"] is None, "of seeds that five divides alone"
    assert "| handle-press-v3 | 100 % | 100 % | - |" in (out / "tables.md").read_text()


def test_the_replaced_method_is_still_needed():
    """Fails where Meta-World mends it: then `_reset_mocap_welds` and the exact version in setup.cfg can go."""
    import mujoco
    from metaworld.sawyer_xyz_env import SawyerMocapBase

    assert version("metaworld") == "3.0.0"
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><body name="a"><freejoint/><geom size="1"/></body><body name="b" mocap="true"/></worldbody>'
        '<equality><weld body1="a" body2="b"/></equality></mujoco>'
    )
    assert model.eq_data.shape[1] > 11
    if SawyerMocapBase.reset_mocap_welds.__module__.startswith("metaworld"):
        with pytest.raises(ValueError, match="broadcast"):
            SawyerMocapBase.reset_mocap_welds(type("Env", (), {"model": model})())


def test_two_policies_are_told_apart(tmp_path, capsys):
    policies = ("compare", "--until-separated", "stop", "oracle", "--out", tmp_path / "out")
    decision = run(capsys, *policies, "--env", "metaworld", "--task", "handle-press-v3", "--max-steps", 60)
    assert decision["winner"] == "B" and decision["after"] <= decision["pairs"] < 100
