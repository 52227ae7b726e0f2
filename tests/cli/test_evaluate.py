import json
import resource
from dataclasses import replace

import numpy as np
import pytest

from tests import recordings, serving
from vlm_local.actions import load_step_table
from vlm_local.assembly import open_policies
from vlm_local.cli import main
from vlm_local.data.runs import RunWriter
from vlm_local.errors import EngineError
from vlm_local.policy_options import PolicyOptions
from vlm_local.server.access import Gate
from vlm_local.server.service import ServerSettings
from vlm_local.types import Observation


@pytest.fixture
def data_set(tmp_path):
    recordings.write_walks(tmp_path / "data", 3, num_steps=10)
    return str(tmp_path / "data")


def _eval(data_set, out, *flags):
    return main(["eval", "--data", data_set, "--out", str(out), *flags])


def test_eval_writes_rows_and_report_and_prints_baselines(data_set, tmp_path, capsys):
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", "--every", "2", "--limit", "2", "--workers", "2") == 0
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    assert [(row["episode"], row["step"]) for row in rows] == [(e, s) for e in (0, 1) for s in range(0, 10, 2)]
    assert {row["phrase"] for row in rows} == {"stop"}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["exact"] == np.mean([row["label"] == "stop" for row in rows])
    assert (tmp_path / "out/report.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(
        name in printed for name in ("10 steps of 2 episodes", "majority", "repeat-last", "random", "oracle-label")
    )


def test_some_episodes_only_and_then_another(data_set, tmp_path, capsys):
    def list_episodes(*names):
        flags = [flag for name in names for flag in ("--episode", name)]
        status = _eval(data_set, tmp_path / "out", "--policy", "stop", *flags)
        return status, sorted({json.loads(line)["episode"] for line in (tmp_path / "out/rows.jsonl").open()})

    assert list_episodes("2") == (0, [2])
    assert list_episodes("2", "0") == (0, [0, 2])
    assert list_episodes("9") == (2, [0, 2])
    assert "has no episode 9" in capsys.readouterr().err


@pytest.mark.parametrize("fewer", [["--limit", "1"], ["--episode", "1"], ["--limit", "2", "--episode", "0"]])
def test_fewer_episodes_than_a_result_holds_are_refused(data_set, tmp_path, capsys, fewer):
    """They were scored with all that were there, under a report that said the limit."""
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", "--limit", "2") == 0
    before = (tmp_path / "out/report.json").read_bytes()
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", *fewer) == 2
    assert "holds answers about episode" in capsys.readouterr().err
    assert (tmp_path / "out/report.json").read_bytes() == before
    assert _eval(data_set, tmp_path / "out", "--policy", "stop") == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["episodes"] == 3


def test_eval_again_asks_nothing(data_set, tmp_path):
    assert _eval(data_set, tmp_path / "out", "--policy", "stop") == 0
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    for synonym in ([], ["--resume"]):
        assert _eval(data_set, tmp_path / "out", "--policy", "stop", *synonym) == 0
        assert (tmp_path / "out/rows.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "out/report.json").read_text())["answer_ms"]["n"] == 30


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--policy", "http://127.0.0.1:9", "--decide", "map", "--steps", "t.json"], "takes no --decide, --steps:"),
        (["--policy", "majority", "--temperature", "2"], "majority takes no --temperature:"),
        (["--quantize", "8bit", "--max-batch", "2"], "--max-batch, --quantize would change nothing: no model"),
        (["--policy", "tiny", "--engine-url", "http://127.0.0.1:9"], "--engine-url would change nothing"),
        (["--policy", "m", "--engine", "openai", "--engine-url", "http://127.0.0.1:9", "--dtype", "bfloat16"],
         "--dtype would change nothing: the server behind"),
    ],
)  # fmt: skip
def test_a_flag_that_would_be_ignored_is_refused(data_set, tmp_path, capsys, flags, says):
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", *flags) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--camera", "front"], "no camera 'front'; it has image_0"),
        (["--policy", "no/such-model", "--offline"], "no/such-model"),
        (["--data", "nowhere"], "no file or folder nowhere"),
    ],
)
def test_eval_refuses_in_a_sentence(data_set, tmp_path, capsys, flags, says):
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", *flags) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--policy", "no/such-model", "--offline"], ["--policy", "stop", "--camera", "front"]]
)
def test_a_run_that_ended_before_its_first_row_leaves_the_folder_free(data_set, tmp_path, wrong):
    assert _eval(data_set, tmp_path / "out", *wrong) == 2
    assert _eval(data_set, tmp_path / "out", "--policy", "move up") == 0
    assert json.loads((tmp_path / "out/report.json").read_text())["policy"]["name"] == "move up"


def test_a_finished_evaluation_is_not_taken_for_one_of_other_settings(data_set, tmp_path, capsys):
    assert _eval(data_set, tmp_path / "out", "--policy", "stop") == 0
    (tmp_path / "steps.json").write_text('{"x_m": 0.02}')
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", "--steps", str(tmp_path / "steps.json")) == 2
    assert "steps.x_m was 0.0125 and is 0.02" in capsys.readouterr().err
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", "--decide", "map") == 2
    assert 'decide was "greedy" and is "map"' in capsys.readouterr().err


def test_what_a_kill_leaves_before_the_settings_are_written_leaves_the_folder_free(data_set, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".lock", "rows.jsonl", "episodes.jsonl"):
        (out / name).touch()
    (out / "evaluation.json.new").write_text('{"plan": ')
    assert _eval(data_set, out, "--policy", "move up") == 0
    (out / "evaluation.json").unlink()
    assert _eval(data_set, out, "--policy", "move up") == 2  # rows without settings are somebody's


def test_on_a_full_disk_it_ends_with_a_sentence_and_goes_on_when_there_is_room(data_set, tmp_path, capsys):
    assert _eval(data_set, tmp_path / "whole", "--policy", "random") == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        assert _eval(data_set, tmp_path / "out", "--policy", "random") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large; the same command goes on" in capsys.readouterr().err
    assert _eval(data_set, tmp_path / "out", "--policy", "random") == 0
    assert (tmp_path / "out/rows.jsonl").read_bytes() == (tmp_path / "whole/rows.jsonl").read_bytes()


def test_calibrate_writes_a_table_that_steps_takes(data_set, tmp_path, capsys):
    out = tmp_path / "steps.json"
    assert main(["calibrate", "--data", data_set, "--out", str(out)]) == 0
    load_step_table(out)
    printed = capsys.readouterr().out
    assert "too few" in printed and "every labelable phrase comes back" in printed
    statistics = json.loads((tmp_path / "steps.statistics.json").read_text())
    assert statistics["steps"] == 3 * 7 and statistics["labels"] and statistics["phrases"]
    assert _eval(data_set, tmp_path / "out", "--policy", "stop", "--steps", str(out)) == 0


def _record(folder, phrases, **more):
    writer = RunWriter(folder)
    writer.start_episode("arm", {"seed": 1})
    for step, phrase in enumerate(phrases):
        line = {"robot": "arm", "phrase": phrase, "instruction": "lift the cup", "proprio": None, "action": [0.0] * 7}
        writer.add_step(line | {"step": step, **more}, recordings.make_images(1, step)[0])
    writer.close()


def test_replay_shows_the_first_divergence(tmp_path, capsys):
    _record(tmp_path / "run", ["stop", "stop", "move up", "stop", None])
    assert main(["replay", str(tmp_path / "run"), "--policy", "stop"]) == 0
    printed = capsys.readouterr().out
    assert "first divergence: step 2" in printed and "3 of 5 answers are the same (60.0 %)" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith(("    2", "    4"))] == ["≠", "≠"]
    _record(tmp_path / "same", ["stop", "stop"])
    assert main(["replay", str(tmp_path / "same"), "--policy", "stop"]) == 0
    out = capsys.readouterr().out
    assert "they agree throughout" in out and "thoughts" not in out


def test_a_replay_without_thoughts_of_a_recording_with_them_says_so(tmp_path, capsys):
    _record(tmp_path / "run", ["stop", "stop"], extra={"reasoning": "TASK: lift", "reasoning_step": 0})
    assert main(["replay", str(tmp_path / "run"), "--policy", "stop"]) == 0
    out = capsys.readouterr().out
    assert "at 2 recorded and 0 replayed steps: this replay is without thoughts" in out
    assert json.loads(out.splitlines()[-1])["reasoned"] == {"recorded": 2, "replayed": 0}


def test_replay_draws_as_the_recorded_server_did_also_where_a_step_was_not_recorded(tmp_path, capsys):
    policy = open_policies(PolicyOptions(model="random")).build("robot")
    policy.reset(0)
    image = recordings.make_images(1, 0)[0]
    observation = Observation(image, "lift the cup")
    said = [policy.act(replace(observation, step=step)).phrase for step in range(6)]
    writer = RunWriter(tmp_path)
    writer.start_episode("arm", {"seed": 0})
    for step in (0, 1, 4, 5):
        line = {"robot": "arm", "phrase": said[step], "instruction": "lift the cup", "proprio": None, "step": step}
        writer.add_step(line | {"action": [0.0] * 7}, image)
    writer.close()
    assert main(["replay", str(tmp_path), "--policy", "random", "--seed", "5"]) == 0
    assert "4 of 4 answers are the same" in capsys.readouterr().out


def test_replay_of_what_is_no_run_is_refused(tmp_path, capsys):
    assert main(["replay", str(tmp_path), "--policy", "stop"]) == 2
    assert "no recorded run" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused(data_set, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for command in (
        ["eval", "--data", data_set, "--policy", "majority", "--out"],
        ["label", data_set, "--out"],
        ["calibrate", "--data", data_set, "--out"],
    ):
        assert main([*command, str(tmp_path / "file" / "out")]) == 2
        assert "cannot write" in capsys.readouterr().err


def test_no_result_of_a_server_with_a_token_holds_the_token(data_set, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with serving.serve(settings=ServerSettings(gate=Gate("verysecret1"))) as server:
        url = f"{server.url}/t/verysecret1"
        assert _eval(data_set, tmp_path / "eval", "--policy", url, "--limit", "1") == 0
        plan = ["--task", "reach", "--episodes", "1", "--max-steps", "2", "--films", "0"]
        assert main(["sim", "--policy", url, *plan]) == 0  # into a folder that is named after the policy
        server.engine.fault = EngineError("out of memory")
        server.service.stopping.set()
        assert _eval(data_set, tmp_path / "fails", "--policy", url) != 0
    printed = capsys.readouterr()
    assert "verysecret1" not in printed.out + printed.err
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 10
    assert not [file for file in written if b"verysecret1" in file.read_bytes() or "verysecret1" in str(file)]


def test_words_of_others_do_not_steer_the_terminal(tmp_path, capsys):
    writer = RunWriter(tmp_path / "run")
    writer.start_episode("arm")
    line = {"robot": "arm", "instruction": "lift\x1b[2J\nforged", "proprio": None, "action": [0.0] * 7}
    writer.add_step(line, recordings.make_images(1, 0)[0])
    writer.close()
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"lift\x1b[2J\nforged" in out
