"""A job's recording and AutoEval's files of it, joined by nothing but the actions."""

import json

import pytest

from tests.server.observing import observe
from tests.serving import until
from vlm_local.cli import main

TASKS = ("open_drawer", "eggplant_in_sink")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Two jobs of two episodes each on one server, recorded, by a model that says something else at each step."""
    folder = tmp_path_factory.mktemp("job")
    with observe(folder / "run", decide="sample") as server:
        server.engine._weigh = lambda request: [1.0] * len(request.sentences)
        for task in TASKS:
            flags = ("--episodes", "2", "--max-steps", "5", "--out", str(folder / task))
            assert main(["station", server.url, "--task", task, *flags]) == 0
        until(lambda: server.observed.report_recording()["written"] == 20)
    return folder


@pytest.mark.slow
def test_every_rollout_finds_its_episode_and_no_other(job, tmp_path, capsys):
    assert main(["outcomes", str(job / "run"), str(job), "--out", str(tmp_path / "table.json")]) == 0
    table = json.loads((tmp_path / "table.json").read_text())
    assert (table["matched"], table["unmatched"]) == (4, [])
    assert [row["steps"] for row in table["episodes"]] == [5] * 4
    assert len({row["episode"] for row in table["episodes"]}) == 4
    counts = {said: rate["n"] for said, rate in table["success"].items()}
    assert counts == {"open the drawer": 2, "put the eggplant in the blue sink": 2}
    assert "robot-0" in capsys.readouterr().out


@pytest.mark.slow
def test_another_jobs_files_are_refused(job, tmp_path, capsys):
    with observe(tmp_path / "run", decide="sample") as server:
        server.act()
        until(lambda: server.observed.report_recording()["written"] == 1)
    assert main(["outcomes", str(tmp_path / "run"), str(job)]) == 2
    assert "another job" in capsys.readouterr().err
