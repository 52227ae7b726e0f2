"""`doctor --model`: the embedded checkpoint and a spoilt copy of it, with the least of every stage."""

import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from safetensors.numpy import load_file, save_file

from tests import recordings
from vlm_local.checkup.findings import conclude, is_faulty
from vlm_local.checkup.scores import score_pictures
from vlm_local.cli import main
from vlm_local.errors import DataError
from vlm_local.files import find_shipped
from vlm_local.lab.evidence.verify import verify

LEAST = ["--minutes", "0.001"]
STAGES = ["loads", "decoding", "speed", "spatial", "eval", "sim"]


def examine(capsys, model, out, *words):
    """Exit status, lines, and the JSON object that the last one is."""
    status = main(["doctor", "--model", str(model), "--out", str(out), *LEAST, *words])
    *lines, last = capsys.readouterr().out.splitlines()
    return status, lines, json.loads(last)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    place = tmp_path_factory.mktemp("data")
    recordings.write_walks(place / "data", 2, num_steps=10)
    return place / "data"


@pytest.fixture(scope="module")
def blind(tmp_path_factory):
    """A checkpoint to which all tokens are alike: it always says the same."""
    folder = shutil.copytree(find_shipped("checkpoints") / "tiny", tmp_path_factory.mktemp("checkpoints") / "blind")
    weights = load_file(folder / "model.safetensors")
    [last] = [name for name in weights if name.endswith("model.norm.weight")]
    save_file({**weights, last: 0 * weights[last]}, folder / "model.safetensors", {"format": "pt"})
    return folder


def make_row(picture, phrase, outlines=None, near_tie=False):
    oracle = ("move left", "move right", "move up")[picture % 3]
    told = {"picture": picture, "task": "reach", "phrase": phrase, "outlines": outlines or phrase, "oracle": oracle}
    return {**told, "near_tie": near_tie, "ms": 10.0, "outlines_ms": 50.0}


@pytest.mark.parametrize(
    ("others", "turned", "blind"), [(1, None, True), (1, 0.05, True), (1, 0.9, False), (4, None, False)]
)
def test_one_answer_to_nearly_all_pictures_is_called_blind_unless_it_turns_with_its_scene(others, turned, blind):
    rows = [make_row(picture, "move up" if picture < others else "stop") for picture in range(10)]
    results = {"decoding": score_pictures(rows)}
    if turned is not None:
        values = {name: {"value": turned} for name in ("turned", "moved", "left")}
        results["spatial"] = {"scenes": 2, **values}
    found = conclude(results)
    assert found[0].endswith("on 10 pictures. It is 5.0 times as fast.") and not is_faulty(results)
    assert any("says 'stop' to 90 % of pictures" in each for each in found) is blind


def test_a_near_tie_may_differ_from_outlines_and_nothing_else():
    tie = make_row(1, "stop", "move up", near_tie=True)
    results = {"decoding": score_pictures([make_row(0, "stop"), tie])}
    assert not is_faulty(results) and "but for 1 near tie." in conclude(results)[0]
    results = {"decoding": score_pictures([make_row(0, "stop", "move up"), tie])}
    assert is_faulty(results) and "WRONG" in conclude(results)[0] and "1 of 2 pictures" in conclude(results)[0]


@pytest.mark.long
def test_a_model_that_always_says_one_thing_is_told_so_and_the_archive_can_be_verified(blind, tmp_path, capsys):
    status, lines, result = examine(capsys, blind, tmp_path / "out", "--device", "cpu")
    assert [line.partition(",")[0] for line in lines[:5]] == [name for name in STAGES if name != "eval"]
    assert status == 0 and not result["faulty"]
    assert any("it does not look" in each for each in result["findings"])
    assert any("does not turn with the scene" in each for each in result["findings"])
    verdict = verify(tmp_path / "out.evidence.zip")
    assert verdict.kind == "doctor" and verdict.report["findings"] == result["findings"]
    assert {"loads", "speed"} <= set(verdict.trusted) and not {"decoding", "spatial", "sim"} & set(verdict.trusted)
    with zipfile.ZipFile(result["archive"]) as archive:
        assert "sim/episodes/reach-0/steps.jsonl" in archive.namelist()

    report = tmp_path / "out" / "report.json"
    report.write_text(report.read_text().replace("it does not look", "it sees everything"))
    with pytest.raises(DataError, match="findings"):
        verify(tmp_path / "out")


@pytest.mark.long
def test_the_embedded_model_passes_and_a_stage_that_failed_is_made_again(data, tmp_path, capsys):
    [file] = data.glob("*.tfrecord*")
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    status, lines, result = examine(capsys, "tiny", tmp_path / "out", "--data", str(data))
    assert status == 1 and result["faulty"] and "could not be found out" in lines[4]
    file.write_bytes(whole)
    before = {name: (tmp_path / "out/stages" / f"{name}.json").read_bytes() for name in STAGES}
    assert verify(tmp_path / "out").kind == "doctor"

    status, lines, result = examine(capsys, "tiny", tmp_path / "out", "--data", str(data))
    after = {name: (tmp_path / "out/stages" / f"{name}.json").read_bytes() for name in STAGES}
    assert [line.partition(",")[0] for line in lines[:6]] == STAGES
    assert status == 0 and [name for name in STAGES if before[name] != after[name]] == ["eval"]
    assert not any("does not" in each for each in result["findings"])
    assert verify(tmp_path / "out.evidence.zip").report["eval"]["steps"] >= 2


@pytest.mark.long
def test_what_was_done_before_a_kill_is_not_done_again(tmp_path, capsys):
    command = [sys.executable, "-m", "vlm_local", "doctor", "--model", "tiny", "--out", str(tmp_path / "out"), *LEAST]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("loads") and process.stdout.readline().startswith("decoding")
        process.kill()
    rows = (tmp_path / "out/pictures.jsonl").read_bytes()
    loads = (tmp_path / "out/stages/loads.json").read_bytes()
    status, lines, _ = examine(capsys, "tiny", tmp_path / "out")
    assert status == 0 and lines[4].startswith("sim")
    assert (tmp_path / "out/pictures.jsonl").read_bytes() == rows
    assert (tmp_path / "out/stages/loads.json").read_bytes() == loads
    assert main(["doctor", "--model", "tiny", "--out", str(tmp_path / "out"), "--minutes", "3"]) == 2
    assert "minutes was 0.001 and is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "stop"], "'stop' has no weights on this machine"),
        (["--model", "http://127.0.0.1:9"], "a server is examined with `doctor URL` alone"),
        (["http://127.0.0.1:9", "--model", "tiny"], "a server is examined with `doctor URL` alone"),
        (["--minutes", "1"], "--minutes would change nothing without --model"),
    ],
)
def test_what_cannot_be_examined_is_refused_in_a_sentence_before_anything_is_written(
    words, sentence, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", *words]) == 2
    told = capsys.readouterr().err
    assert sentence in told and len(told.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
