"""Folders, files and servers that are not what they should be: one sentence on stderr, status 2, no traceback."""

import json
import pickle

import numpy as np
import pytest

from tests.test_client import ForeignServer
from vlm_local.cli import main
from vlm_local.lab.station import way

TASK = ("--task", "eggplant_in_sink", "--max-steps", "2", "--test-every", "0")
PLAN = {
    "seed": 0,
    "task": "open_drawer",
    "max_steps": 2,
    "clock": "step",
    "url": "http://127.0.0.1:1",
    "human_eval": False,
}
REPORT = json.dumps({"station": PLAN, "would_have_ended": []})
LINE = {"episode": 0, "sent": [0.0] * 8, "success": True}


def _refused(capsys, says, *words):
    """The command ends with status 2 and one sentence that says so."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"vlm-local {words[0]}: ") and says in last and len(last) < 700


def _write_run(folder, episodes):
    """episodes: (instruction, actions (T, 7)) of each."""
    for number, (instruction, actions) in enumerate(episodes):
        episode = folder / "episodes" / f"robot-{number}"
        episode.mkdir(parents=True)
        (episode / "meta.json").write_text("{}")
        lines = [{"step": step, "instruction": instruction, "action": list(row)} for step, row in enumerate(actions)]
        (episode / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _write_rollout(path, actions, instruction, success=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {"obs": {}, "action": list(actions), "language_command": instruction, "success": success}
    path.write_bytes(pickle.dumps(fields))


ANSWERS = {
    "another status": (b'{"error":\n"busy"}', '503: {"error": "busy"}'),
    "a page": (b"<!DOCTYPE html>\n<html>\nlog in\n</html>", "7 finite numbers"),
    "not a number": (b"[NaN, 0, 0, 0, 0, 0, 1]", "7 finite numbers"),
    "eight numbers": (b"[0, 0, 0, 0, 0, 0, 1, 1]", "7 finite numbers"),
    "text": (b'["0", "0", "0", "0", "0", "0", "1"]', "7 finite numbers"),
    "beyond a float": (json.dumps([10**400] * 7).encode(), "7 finite numbers"),
    "an endless shape": (b'{"__numpy__": "AAAA", "dtype": "<f8", "shape": [1' + b"0" * 30 + b"]}", "7 finite numbers"),
    "too much": (b" " * (5 << 20), "more than"),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_server_that_answers_something_else_is_refused_by_the_form(tmp_path, capsys, answer):
    body, says = ANSWERS[answer]
    with ForeignServer(body) as server:
        path = "/nowhere" if says.startswith("503") else ""  # whatever is no /act gets the other status
        server.reset_status = 503
        _refused(capsys, says, "station", server.url + path, *TASK, "--out", tmp_path / "job")


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000",
        "https://127.0.0.1",
        "http://127.0.0.1:99999",
        "http://[::1",
        "http://a..b",
        "http://nö.invalid",
    ],
)
def test_an_address_that_is_none_is_refused(tmp_path, capsys, url):
    _refused(capsys, "address", "station", url, *TASK, "--out", tmp_path / "job")


def test_what_a_job_cannot_be_played_with_is_refused_and_its_folder_stays_free(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "mein jöb"
    with ForeignServer() as server:
        job = ("station", server.url, *TASK)
        _refused(capsys, "Not a directory; name another --out", *job, "--out", tmp_path / "file")
        _refused(capsys, "holds something already", *job, "--out", tmp_path)
        _refused(
            capsys, "never reached in 2 episodes", *job, "--episodes", 2, "--out", out, "--restart-at", "2:0", "true"
        )
        _refused(capsys, "--detector is truth or", *job, "--out", out, "--detector", "ftp://x")
        _refused(capsys, "not 'none'", *job, "--out", out, "--reset-policy", "none")
    assert not out.exists() or not list(out.iterdir())


def test_a_server_that_is_gone_for_good_ends_the_job_with_the_episodes_before(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(way, "BACK_S", 0.2)
    server = ForeignServer()
    server.ends_after = 5  # the submission test, a reset and two steps of the first episode, the next one's reset
    with server:
        job = ["station", server.url, *TASK, "--episodes", "3", "--out", str(tmp_path / "job")]
        assert main(job) == 1
    assert "ended after 1 of 3 episodes: no connection to 127.0.0.1" in capsys.readouterr().out
    report = json.loads((tmp_path / "job" / "report.json").read_text())
    assert report["success"]["n"] == 1 and report["would_have_ended"][0]["episode"] == 1


@pytest.mark.parametrize(
    ("report", "lines", "says"),
    [
        (None, [LINE], "report.json cannot be read"),
        ("<html>", [LINE], "no JSON"),
        ("[1]", [LINE], "holds a list"),
        ("[" * 100_000, [LINE], "nested too deeply"),
        ("{}", [LINE], "not as `station` wrote them"),
        (REPORT, [], "no episode"),
        (REPORT, ["text"], "not as `station` wrote them"),
        (REPORT, [{**LINE, "success": "no"}], "not as `station` wrote them"),
    ],
)
def test_a_job_that_was_changed_is_not_compared(tmp_path, capsys, report, lines, says):
    folder = tmp_path / "mein jöb"
    folder.mkdir()
    if report is not None:
        (folder / "report.json").write_text(report)
    (folder / "station.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _refused(capsys, says, "compare", folder, folder, "--name", "A=once", "--name", "B=twice")


def test_what_is_no_result_is_not_compared(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere", __file__):
        _refused(
            capsys, "eval, sim, spatial, station", "compare", folder, folder, "--name", "A=once", "--name", "B=twice"
        )


def test_outcomes_wants_a_run_and_pickles(tmp_path, capsys):
    run = _write_run(tmp_path / "run", [("open it", np.ones((3, 7)))])
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "nowhere", tmp_path / "empty", __file__):
        _refused(capsys, "no run folder", "outcomes", folder, tmp_path)
    for folder in (tmp_path / "nowhere", tmp_path / "empty", run):
        _refused(capsys, "expected a .pkl file", "outcomes", run, folder)
    _write_rollout(tmp_path / "jobs" / "traj_0.pkl", [[10**400] * 7] * 3, "open it")
    _refused(capsys, "another job?", "outcomes", run, tmp_path / "jobs")
    _write_rollout(tmp_path / "jobs" / "traj_0.pkl", np.ones((3, 7)), "open it")
    _refused(capsys, "cannot write", "outcomes", run, tmp_path / "jobs", "--out", tmp_path / "empty")


def test_two_jobs_in_one_folder_are_told_apart_by_their_words(tmp_path, capsys):
    """Their actions are alike, and so are their files' names; one file's name has a digit that is no number."""
    stop = np.zeros((3, 7))
    run = _write_run(tmp_path / "run", [("open it", stop), ("close it", stop), ("open it", stop)])
    _write_rollout(tmp_path / "jobs" / "1" / "traj_0.pkl", stop, "close it", success=False)
    _write_rollout(tmp_path / "jobs" / "2 ä" / "traj_1²0.pkl", stop, "open it")
    assert main(["outcomes", str(run), str(tmp_path / "jobs"), "--out", str(tmp_path / "table.json")]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["episodes"]
    assert [(row["episode"], row["rollout"], row["success"]) for row in rows] == [
        ("robot-1", "1/traj_0.pkl", False),
        ("robot-0", "2 ä/traj_1²0.pkl", True),
    ]
    assert "robot-0, robot-2 have its actions alike" in capsys.readouterr().err
