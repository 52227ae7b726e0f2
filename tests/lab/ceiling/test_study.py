"""The command from end to end: rows, pages, going on after a kill, what it refuses."""

import json
import re
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from vlm_local.cli import main
from vlm_local.errors import ConfigError
from vlm_local.lab.ceiling.episodes import CeilingPlan, Episodes, find_played
from vlm_local.lab.ceiling.report import write_report
from vlm_local.lab.ceiling.scores import find_loss, score_steps
from vlm_local.lab.ceiling.settings import OPPOSITE, PLAIN, Setting, build_error
from vlm_local.lab.results import ResultFolder

SETTINGS = [PLAIN, build_error("x", OPPOSITE, 0.4), Setting(latency=1)]


def ceiling(out, *arguments) -> int:
    return main(["ceiling", "--out", str(out), "--workers", "1", *map(str, arguments)])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("ceiling") / "out"
    assert ceiling(out, "--tasks", "close_drawer", "--episodes", 1, "--level", "easy", "--seed", 3) == 0
    return out


@contextmanager
def open_study(path, episodes: int):
    plan = CeilingPlan(("close_drawer",), "easy", episodes, 3)
    with ResultFolder(path, "ceiling", "ceiling.json") as folder, closing(Episodes(folder, plan, SETTINGS)) as study:
        yield study


def play(path, episodes: int):
    with open_study(path, episodes) as study:
        study.play_missing("episodes", 1)
        return study.collect()


@pytest.mark.slow
def test_rows_report_and_pages(result):
    rows = [json.loads(line) for line in (result / "rows.jsonl").read_text().splitlines()]
    report, made = (json.loads((result / name).read_text()) for name in ("report.json", "ceiling.json"))
    assert report["git"] == made["git"]
    assert [(row["task"], row["seed"], len(row["steps"])) for row in rows] == [("close_drawer", 3, 95)]
    curves = {(curve["study"], curve["line"]): curve for curve in report["curves"]}
    plain = curves["vocabulary", ""]["tasks"]["close_drawer"][-1]
    assert plain["success_70"]["rate"] == 1 and plain == curves[OPPOSITE, "x"]["tasks"]["close_drawer"][0]
    page = (result / "report.html").read_text()
    assert page.count("<svg") == 7 and "a model that says the opposite on x" in page
    assert "| close_drawer |" in (result / "tables.md").read_text()
    assert {path.stem for path in result.glob("*.png")} >= {"scale", "hold", "latency", "opposite"}


@pytest.mark.slow
def test_a_ceiling_in_the_headline_is_of_the_better_oracle(tmp_path):
    """Of the published curves: one step late, one oracle pushes in 50 % and the other in 97 % of the episodes."""
    write_report(tmp_path, json.loads(Path("docs/ceiling/report.json").read_text()))
    before, _ = (tmp_path / "report.html").read_text().split("one step late", 1)
    assert re.findall(r"(\d+) %", before)[-1] == "100"


@pytest.mark.slow
def test_what_is_whole_in_a_folder(result, tmp_path):
    assert find_played(result) == CeilingPlan(("close_drawer",), "easy", 1, 3)
    (tmp_path / "ceiling.json").write_bytes((result / "ceiling.json").read_bytes())
    row = json.loads((result / "rows.jsonl").read_text())
    rows = [row | {"task": task, "seed": seed} for task, seed in (("reach", 3), ("lift", 3), ("reach", 4), ("lift", 6))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_played(tmp_path) == CeilingPlan(("reach", "lift"), "easy", 1, 3)
    with pytest.raises(ConfigError, match="no whole episode yet"):
        find_played(tmp_path / "nothing")


def test_it_goes_on_after_a_kill(tmp_path):
    play(tmp_path, 2)
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # killed while it wrote the last line
    with open_study(tmp_path, 2) as study:
        assert study.find_missing() == [("close_drawer", 4)]
    play(tmp_path, 2)
    assert path.read_bytes() == whole


def test_episodes_are_added(tmp_path):
    few, many = play(tmp_path, 1), play(tmp_path, 2)
    assert [len(steps["close_drawer", PLAIN]) for steps in (few, many)] == [1, 2]
    play(tmp_path / "at once", 2)
    assert (tmp_path / "rows.jsonl").read_bytes() == (tmp_path / "at once/rows.jsonl").read_bytes()


def test_episodes_added_elsewhere_are_said_beside(tmp_path):
    play(tmp_path, 1)
    made = json.loads((tmp_path / "ceiling.json").read_text())
    (tmp_path / "ceiling.json").write_text(json.dumps(made | {"git": "an older commit"}))
    for episodes, others in ((1, []), (2, [made["git"]])):  # at first nothing is played
        play(tmp_path, episodes)
        again = json.loads((tmp_path / "ceiling.json").read_text())
        assert again["git"] == "an older commit"
        assert [part["git"] for part in again.get("continued_with", [])] == others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "reach,fly"), "task must be one of reach"),
        (("--level", "hardest"), "level must be one of"),
        (("--predict", "somewhere"), "they go in pairs"),
        (("--predict", "somewhere", "--observed", "nowhere"), "nowhere is no result folder"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(arguments, message, tmp_path, capsys):
    assert ceiling(tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_of_something_else_is_refused(result, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert ceiling(tmp_path) == 2
    assert "holds something else than a result of `ceiling`" in capsys.readouterr().err
    assert ceiling(result, "--seed", 4, "--level", "easy") == 2
    assert "holds a result with other settings: seed was 3 and is 4" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_changed_by_hand_are_refused(result, tmp_path, capsys):
    (tmp_path / "ceiling.json").write_bytes((result / "ceiling.json").read_bytes())
    line = (result / "rows.jsonl").read_text()
    for text, message in (
        (line + line, "has episodes twice"),
        ('{"task": "reach"}\n', "something else changed the file"),
    ):
        (tmp_path / "rows.jsonl").write_text(text)
        assert ceiling(tmp_path, "--level", "easy", "--seed", 3) == 2
        assert message in capsys.readouterr().err


def test_scores_of_a_cell():
    point = score_steps([10, 70, 71, None])
    assert [point[f"success_{limit}"]["count"] for limit in (70, 120)] == [2, 3]
    assert point["steps"]["mean"] == pytest.approx(151 / 3) and score_steps([None, 5])["steps"] is None


def test_paired_losses():
    loss = find_loss([10, 20, 30, 40], [10, 25, None, 80])
    assert loss["loss"] == 0.5 and loss["more_steps"] == pytest.approx(15)
