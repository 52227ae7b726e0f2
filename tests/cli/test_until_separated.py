"""`compare --until-separated`: two policies are played until it is known which is better."""

import json

import pytest

from tests import serving
from vlm_local.cli import main
from vlm_local.errors import EngineError

PLAN = ("--task", "open_drawer", "--max-steps", "40", "--episodes", "10")
SHORT = ("--task", "open_drawer", "--max-steps", "2", "--episodes", "6")


def _play(capsys, out, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["compare", "--until-separated", *arguments, "--out", str(out)])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    out = tmp_path_factory.mktemp("played") / "out"
    assert main(["compare", "--until-separated", "stop", "oracle", *PLAN, "--out", str(out)]) == 0
    return out


@pytest.mark.long
def test_the_better_policy_is_found_and_the_same_command_plays_nothing_again(played, capsys):
    decision = json.loads((played / "decision.json").read_text())
    assert (decision["winner"], decision["by"], decision["policies"]["B"]) == ("B", "success", "oracle")
    assert decision["after"] <= decision["pairs"] == 10
    low, high = decision["measures"]["success"]["interval"]
    assert low == -1.0 and high < 0 and decision["measures"]["success"]["capital"] >= 40
    before = {path: path.stat().st_mtime_ns for path in played.rglob("steps.jsonl")}
    status, out, _ = _play(capsys, played, "stop", "oracle", *PLAN)
    assert status == 0 and f"B (oracle) is better: by success, told apart after {decision['after']} pairs" in out
    assert {path: path.stat().st_mtime_ns for path in played.rglob("steps.jsonl")} == before and len(before) == 20
    assert main(["compare", str(played / "A"), str(played / "B")]) == 0
    assert "10 shared episodes" in capsys.readouterr().out


@pytest.mark.slow
def test_tests_for_a_number_chosen_beforehand_are_told_not_to_hold_afterwards(tmp_path, capsys):
    assert _play(capsys, tmp_path, "stop", "stop", *SHORT)[0] == 0
    assert main(["compare", str(tmp_path / "A"), str(tmp_path / "B")]) == 0
    assert "played until separated, so that p and intervals here do not hold" in capsys.readouterr().out


@pytest.mark.slow
def test_equal_policies_are_not_told_apart(tmp_path, capsys):
    status, out, _ = _play(capsys, tmp_path, "stop", "stop", *SHORT)
    assert status == 0 and "not told apart in 6 pairs" in out and "no difference of success rates is found" in out
    assert json.loads((tmp_path / "decision.json").read_text())["winner"] is None


@pytest.mark.slow
def test_a_policy_that_fails_is_not_judged(tmp_path, capsys):
    with serving.serve() as server:
        server.engine.fault = EngineError("out of memory")
        status, _, told = _play(capsys, tmp_path, server.url, "stop", *SHORT)
    assert status == 2 and "without a fault" in told and not (tmp_path / "decision.json").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a", "b", "--task", "lift", "--seed", "1"], "--task, --seed would change nothing without --until-separated"),
        (["stop", "--until-separated", "--out", "x"], "plays two policies"),
        (["stop", "oracle", "--until-separated"], "into --out DIR"),
        (["stop", "oracle", "--until-separated", "--out", "x", "--name", "A=b"], "takes no --name"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    assert says in capsys.readouterr().err
