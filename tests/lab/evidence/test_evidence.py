"""Archives of results: the same bytes again, scored without weights, refused once anything was changed."""

import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import recordings
from tests.slow import slow
from vlm_local.answers import Answer
from vlm_local.checkpoint import open_checkpoint
from vlm_local.cli import main
from vlm_local.data.multiple_choice import ChoiceQuestion
from vlm_local.errors import ConfigError, DataError
from vlm_local.lab.closed_loop.scores import score_run
from vlm_local.lab.evidence.archive import MANIFEST, pack, seal
from vlm_local.lab.evidence.card import BEGIN, END, write_card
from vlm_local.lab.evidence.choices import list_choices, list_runs_choices
from vlm_local.lab.evidence.leaderboard import write_leaderboard
from vlm_local.lab.evidence.verify import VerifiedResult, verify
from vlm_local.lab.multiple_choice.run import evaluate_questions

STOP = [0, 0, 0, 0, 0, 0, 1]
HUGE = "1" + 400 * "0"  # more than a double holds


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    place = tmp_path_factory.mktemp("eval")
    recordings.write_walks(place / "data", 3, num_steps=10)
    arguments = ["--data", str(place / "data"), "--out", str(place / "out"), "--policy", "random"]
    assert main(["eval", *arguments]) == 0
    return place / "out"


@pytest.fixture(scope="module")
def simulation(tmp_path_factory):
    out = tmp_path_factory.mktemp("sim") / "out"
    plan = ["--task", "reach", "--episodes", "2", "--max-steps", "14", "--films", "1", "--workers", "1", "--seed", "40"]
    assert main(["sim", "--policy", "oracle", "--out", str(out), *plan]) == 0
    return out


@pytest.fixture(scope="module")
def choices(tmp_path_factory):
    pixels = (np.full((8, 8, 3), shade, np.uint8) for shade in range(4))
    options = {"A": "left", "B": "right"}
    questions = [
        ChoiceQuestion(str(index), (picture,), "Where?", options, "AB"[index % 2], "place")
        for index, picture in enumerate(pixels)
    ]
    out = tmp_path_factory.mktemp("choices") / "out"
    about = {"policy": {"name": "A"}, "data": "bench.tsv", "data_sha256": 64 * "0"}
    evaluate_questions(questions, lambda *_: Answer("A", {"A": 0.75, "B": 0.25}, 0.0, {}), out, about, [])
    return out


@pytest.fixture(params=["evaluation", "simulation", "choices"])
def result(request, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "result")


def change(path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def rewrite(archive, changed=(), removed=(), added=(), **fields):
    """The archive with members changed {name: bytes}, removed, or added [(name or ZipInfo, bytes)]."""
    with zipfile.ZipFile(archive) as source:
        members = {name: source.read(name) for name in source.namelist() if name not in removed}
    manifest = json.loads(members[MANIFEST])
    manifest |= fields
    members |= {MANIFEST: (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode(), **dict(changed)}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name, data in [*members.items(), *added]:
            target.writestr(name, data)


def test_a_result_is_packed_to_the_same_bytes_and_follows(result, tmp_path):
    one, other = tmp_path / "one.zip", tmp_path / "other.zip"
    manifest = pack(result, one)
    shutil.copytree(result, tmp_path / "copy")
    assert seal(pack(tmp_path / "copy", other)) == seal(manifest)
    assert one.read_bytes() == other.read_bytes()
    assert "report.html" not in manifest["files"]
    verdict = verify(one)
    assert verdict.seal == seal(manifest) == verify(result).seal
    assert verdict.report == json.loads((result / "report.json").read_text())
    assert verdict.num_numbers > 20 and "versions" in verdict.trusted
    assert not {"exact", "tasks", "success_rate"} & set(verdict.trusted)


def test_pictures_can_stay_behind(simulation, tmp_path):
    whole, light = pack(simulation, tmp_path / "whole.zip"), pack(simulation, tmp_path / "light.zip", pictures=False)
    left = set(whole["files"]) - set(light["files"])
    assert {name.rpartition(".")[2] for name in left} == {"png", "mp4"} and "episodes/reach-0/film.mp4" in left
    assert verify(tmp_path / "light.zip").report == verify(tmp_path / "whole.zip").report
    one = ["pack", str(simulation), "--out", str(tmp_path / "one.zip"), "--episode"]
    assert main([*one, "reach-0"]) == 0 and main([*one, "reach-9"]) == 2
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        pictures = left & set(archive.namelist())
    assert pictures == {name for name in left if "/reach-0/" in name} != set()


@pytest.mark.parametrize(
    ("source", "file", "old", "new", "message"),
    [
        ("evaluation", "report.json", '"exact": ', '"exact": 1', "exact is"),
        ("evaluation", "report.json", '"exact": ', f'"exact": {HUGE}, "was": ', "are not those"),
        ("evaluation", "report.json", '"seed": 0', '"seed": 1', "seed is 1 and comes out as 0"),
        ("evaluation", "report.json", '"three_axis"', '"four_axis"', "four_axis is nothing that is scored"),
        ("evaluation", "rows.jsonl", '"step": 1,', '"step": 2,', "not every step once.* episode 0, step 1"),
        ("evaluation", "rows.jsonl", '"step": 9,', '"step": 10,', "not every step once.* episode 0, step 9"),
        ("evaluation", "rows.jsonl", '"label": "', '"label": "stop, ', "is no evaluation's rows"),
        ("evaluation", "rows.jsonl", '"previous_label": null', '"previous_label": "stop"', "episode 0, step 0 is not"),
        ("evaluation", "rows.jsonl", '"full_window": true', '"full_window": false', "episode 0, step 0 is not as its"),
        ("evaluation", "rows.jsonl", '"phrase_source"', '"probability": 1.5, "phrase_source"', "outside of 0 to 1"),
        ("evaluation", "rows.jsonl", '"phrase_source"', f'"probability": {HUGE}, "phrase_source"', "not those"),
        ("evaluation", "evaluation.json", '"every": 1', '"every": 0', "are not those of `eval`"),
        ("evaluation", "report.json", '"exact": ', f'"deep": {10**5 * "["}{10**5 * "]"}, "exact": ', "nested too deep"),
        ("choices", "report.json", '"chance": ', '"chance": 1', "chance is"),
        ("choices", "report.json", '"questions": 4', '"questions": 5', "has 4 rows and a report of 5"),
        ("choices", "rows.jsonl", '"answer": "A"', '"answer": "B"', "does not follow"),
        ("choices", "rows.jsonl", '"answer": "A"', '"answer": "C"', "are none of its choices"),
        ("choices", "rows.jsonl", '"answer": "A"', '"answer": null', "are none of its choices"),
        ("choices", "rows.jsonl", '"index": "1"', '"index": "0"', "the question of index 0 twice"),
        ("choices", "rows.jsonl", '"A": 0.75', '"A": NaN', "probabilities of index 0"),
        ("choices", "rows.jsonl", '"A": 0.75', '"A": 0.95', "probabilities of index 0"),
        ("choices", "rows.jsonl", '"fault": null', '"fault": "out of memory"', "are none of its choices"),
        ("simulation", "meta.json", '"control": "none"', '"control": "<b>"', "there is no control '<b>'"),
        ("simulation", "meta.json", '"noise": 0.0', '"noise": -1', "with noise -1"),
        ("simulation", "meta.json", '"reach"', '"reach", "reach"', "each once"),
        ("simulation", "meta.json", '"max_steps": 14', '"max_steps": 1000000000', "has at most 10000 steps"),
        ("simulation", "report.json", '"reach": 1.0', '"reach": 0.5', "reach is 0.5"),
        ("simulation", "meta.json", '"seed": 40', '"seed": 41', "is of another episode"),
        ("simulation", "episodes/reach-0/meta.json", '"oracle_steps": ', '"oracle_steps": 1', "played again"),
        ("simulation", "episodes/reach-1/meta.json", '"agreed": ', '"agreed": 1', "played again"),
        ("simulation", "episodes/reach-1/steps.jsonl", '"action": [', '"action": [0, ', "are not those"),
        ("simulation", "episodes/reach-1/steps.jsonl", '"action": [', f'"action": {STOP}, "was": [', "played again"),
    ],
)
def test_what_is_changed_before_packing_does_not_follow(source, file, old, new, message, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(source), tmp_path / "spoiled")
    change(folder / file, old, new)
    pack(folder, tmp_path / "spoiled.zip")
    with pytest.raises(DataError, match=message):
        verify(tmp_path / "spoiled.zip")


def test_an_evaluation_without_its_wrong_rows_is_refused(evaluation, tmp_path):
    folder = shutil.copytree(evaluation, tmp_path / "better")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    kept = [row for row in rows if row["episode"] or row["step"] != 4]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(DataError, match=r"not every step once.* episode 0, step 4"):
        verify(folder)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_changed_after_packing_is_refused(result, tmp_path):
    archive = tmp_path / "result.zip"
    files = pack(result, archive)["files"]
    report = (result / "report.json").read_bytes()
    link = zipfile.ZipInfo("rows.jsonl.link")
    link.external_attr = 0o120777 << 16
    escape = {"bytes": 1, "sha256": "0" * 64}
    for spoil, message in (
        ({"changed": {"report.json": report.replace(b"1", b"2", 1)}}, "is not what was packed"),
        ({"changed": {"report.json": report + b" "}}, "is longer than its"),
        ({"changed": {"report.json": report[:-1]}}, "is not what was packed"),
        ({"removed": ["report.json"]}, "lacks 'report.json'.*removed"),
        ({"added": [("notes.txt", b"")]}, "holds 'notes.txt'.*added"),
        ({"added": [("../evil", b"")]}, "added"),
        ({"added": [(link, b"/etc/passwd")]}, "added"),
        ({"added": [("report.json", report)]}, "holds a file twice"),
        ({"added": [("../evil", b"x")], "files": files | {"../evil": escape}}, r"names '\.\./evil', which no result"),
        ({"added": [("/evil", b"x")], "files": files | {"/evil": escape}}, "names '/evil', which no result"),
        ({"files": {name: file for name, file in files.items() if name != "report.json"}}, "added after"),
        ({"kind": "other"}, "reads no other"),
        ({"format": "2"}, "reads no other"),
        ({"files": files | {"report.json": files["report.json"] | {"bytes": 10**12}}}, "is not unpacked"),
        ({"changed": {MANIFEST: b"{}"}}, "reads no other"),
        ({"changed": {MANIFEST: b"[" * 10**6}}, "."),
    ):
        copy = tmp_path / "copy.zip"
        shutil.copy(archive, copy)
        rewrite(copy, **spoil)
        with pytest.raises(DataError, match=message):
            verify(copy)
    assert not (tmp_path / "evil").exists() and not (tmp_path.parent / "evil").exists()


def test_a_bomb_is_not_unpacked(evaluation, tmp_path):
    """A member that says it is short and goes on, and one that says how long it is."""
    archive = tmp_path / "bomb.zip"
    files = pack(evaluation, archive)["files"]
    rewrite(archive, changed={"rows.jsonl": bytes(10**7)}, files=files)
    assert archive.stat().st_size < 10**5
    with pytest.raises(DataError, match="is longer than its"):
        verify(archive)
    rewrite(archive, files=files | {"rows.jsonl": {"bytes": 10**9, "sha256": "0" * 64}})
    with pytest.raises(DataError, match="would unpack to"):
        verify(archive)


def test_damaged_archives_are_a_sentence(evaluation, tmp_path):
    archive = tmp_path / "result.zip"
    pack(evaluation, archive)
    whole = archive.read_bytes()
    start = whole.index(b"rows.jsonl")
    for damaged in (b"", whole[:-100], whole[:start] + bytes(64) + whole[start + 64 :], b"PK" + struct.pack("<H", 9)):
        archive.write_bytes(damaged)
        with pytest.raises(DataError, match=r"no archive|lacks|holds"):
            verify(archive)
    with pytest.raises(DataError, match="No such file"):
        verify(tmp_path / "nothing.zip")


def test_what_is_no_result_is_not_packed(evaluation, tmp_path):
    with pytest.raises(DataError, match="is no result folder"):
        pack(tmp_path, tmp_path / "x.zip")
    unfinished = shutil.copytree(evaluation, tmp_path / "unfinished", ignore=shutil.ignore_patterns("report.json"))
    with pytest.raises(DataError, match=r"without report\.json"):
        pack(unfinished, tmp_path / "x.zip")
    with pytest.raises(ConfigError, match="cannot write"):
        pack(evaluation, evaluation / "report.json" / "x.zip")


def test_a_token_is_never_packed(evaluation, tmp_path):
    folder = shutil.copytree(evaluation, tmp_path / "old")
    change(folder / "evaluation.json", '"policy": "random"', '"policy": "http://h/t/verysecret1"')
    with pytest.raises(DataError, match="holds a token or password"):
        pack(folder, tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize(
    "name",
    ["x | y", "a\nb", "", 121 * "x", 5, *map(slow, ("<img src=a>", "[here](http://evil)", "\u202eelcaro", "`code`"))],
)
def test_the_leaderboard_shows_no_name_that_is_none(simulation, tmp_path, capsys, name):
    folder = shutil.copytree(simulation, tmp_path / "run")
    for file in ("meta.json", "report.json"):
        change(folder / file, '"policy": "oracle"', f'"policy": {json.dumps(name)}')
    assert main(["leaderboard", str(folder), "--out", str(tmp_path / "board.md")]) == 2
    assert "is no name" in capsys.readouterr().err and not (tmp_path / "board.md").exists()


def test_the_leaderboard_escapes_what_others_wrote(simulation, tmp_path, capsys):
    folder = shutil.copytree(simulation, tmp_path / "run")
    for file in ("meta.json", "report.json"):
        change(folder / file, '"policy": "oracle"', '"policy": "_my_model, http://host/t/verysecret1"')
    assert main(["leaderboard", str(folder), "--out", str(tmp_path / "board.md")]) == 0
    assert "| `_my_model, http://host/t/***` | - |" in (tmp_path / "board.md").read_text()
    change(folder / "report.json", '"git": ', '"git": "abc | def", "was": ')
    change(folder / "meta.json", '"git": ', '"git": "abc | def", "was": ')
    assert main(["leaderboard", str(folder), "--out", str(tmp_path / "board.md")]) == 2
    assert "neither a sha256 nor a commit" in capsys.readouterr().err


CHANGED = {"contrast": 0.5, "decide": "sample", "frames": {"num": 4}, "prompt": {"name": "short"}, "noise": 0.5}


def _play_changed(folder: Path, weights: str, **more: Any) -> Path:
    """The run, as if a model with settings of its own had played it."""
    for name in ("meta.json", "report.json"):
        about = json.loads((folder / name).read_text())
        about |= {"engine": "local", "checkpoint_sha256": weights, **CHANGED, **more}
        about["simulator"]["noise"] = about.pop("noise")
        (folder / name).write_text(json.dumps(about))
    return folder


def test_the_leaderboard_names_settings_that_make_another_policy_of_the_same_weights(simulation, tmp_path):
    folder = _play_changed(shutil.copytree(simulation, tmp_path / "run"), 64 * "a")
    assert main(["leaderboard", str(folder), "--out", str(tmp_path / "board.md")]) == 0
    (row,) = (line for line in (tmp_path / "board.md").read_text().splitlines() if line.startswith("| oracle"))
    cells = row.split(" | ")
    assert cells[0] == "| oracle, 50% random, decide sample, contrast 0.5, prompt short, frames 4"
    assert cells[3].endswith("at 14") and cells[4] == "-"  # success within 70 steps is not known


def test_a_model_card_keeps_changed_settings_apart(simulation, tmp_path):
    model = shutil.copytree(Path("checkpoints/tiny"), tmp_path / "model")
    changed = _play_changed(shutil.copytree(simulation, tmp_path / "run"), open_checkpoint(model).sha256)
    assert main(["card", str(model), str(changed)]) == 0
    # The checkpoint itself samples, so that is no other setting.
    setting = "level normal, 50% random, contrast 0.5, prompt short, frames 4, 14 steps"
    assert f"| within 70 steps | {setting} |" in (model / "README.md").read_text()


@pytest.mark.parametrize(
    ("policy", "own", "told"),
    [
        ({"engine": "scripted", "contrast": 0.5}, {}, []),
        ({"grammar": {"name": "primitives_moves"}}, {}, ["grammar primitives_moves"]),
        ({"grammar": {"name": "primitives_moves"}}, {"grammar": "primitives_moves"}, []),
        ({"prompt": {"name": "mine"}}, {"prompt": "folder/mine.txt"}, []),
        ({"steps": {"x_m": 0.02}}, {}, ["own steps"]),
        ({"steps": {"slightly": 0.5}}, {}, []),
        ({"steps": {"x_m": 0.02}, "embodiment": "libero"}, {}, ["embodiment libero"]),
    ],
)
def test_settings_that_are_a_checkpoints_own_or_a_robots_are_not_named(policy, own, told):
    assert list_choices({"engine": "local", **policy}, own) == told


def test_a_run_whose_policy_saw_nothing_is_named():
    assert list_runs_choices({"noise": 0, "control": "blind"}) == ["blind"]


@pytest.mark.parametrize(("name", "shown"), [("my_short", r"prompt my\_short,"), ("a | b", None), ("[a](b)", None)])
def test_a_model_card_shows_a_prompts_name_as_plain_words_or_not_at_all(simulation, tmp_path, capsys, name, shown):
    model = shutil.copytree(Path("checkpoints/tiny"), tmp_path / "model")
    weights, before = open_checkpoint(model).sha256, (model / "README.md").read_text()
    played = _play_changed(shutil.copytree(simulation, tmp_path / "run"), weights, prompt={"name": name})
    assert main(["card", str(model), str(played)]) == (0 if shown else 2)
    if shown:
        assert shown in (model / "README.md").read_text()
    else:
        assert "is no name" in capsys.readouterr().err and (model / "README.md").read_text() == before


def test_the_leaderboard_names_the_environment_and_no_steps_that_nobody_took(tmp_path):
    """With `--env` left out, the command that the page gives plays other episodes."""
    episode = {"task": "reach-v3", "outcome": "success", "steps": 9, "stage": 1, "agreed": 0, "oracle_steps": None}
    plan = {"policy": "a", "env": "metaworld", "level": "normal", "seed": 0, "max_steps": 500}
    report = {"simulator": plan | {"noise": 0.0, "control": "none"}, **score_run([episode], {"reach-v3": ("done",)})}
    assert write_leaderboard([VerifiedResult("sim", 64 * "a", 1, 1, report, [])], tmp_path / "board.md") == 1
    text = (tmp_path / "board.md").read_text()
    assert "### reach-v3 of metaworld, level normal\n" in text and "| 9.0 (-) |" in text


def test_a_model_card_is_of_our_simulator_alone(tmp_path):
    """70 steps are 14 seconds here, and less than one in Meta-World."""
    model = shutil.copytree(Path("checkpoints/tiny"), tmp_path / "model")
    report = {"checkpoint_sha256": open_checkpoint(model).sha256, "simulator": {"env": "metaworld"}}
    with pytest.raises(DataError, match="was played in metaworld"):
        write_card(model, [VerifiedResult("sim", 64 * "a", 1, 1, report, [])])


def test_the_leaderboard_takes_verified_runs_only(simulation, evaluation, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(simulation, tmp_path / "run")
    board, archive = tmp_path / "results/leaderboard.md", tmp_path / "run.evidence.zip"
    monkeypatch.chdir(tmp_path)
    assert main(["pack", str(folder)]) == 0
    stamp = json.loads(capsys.readouterr().out.splitlines()[-1])["seal"]
    assert main(["verify", str(archive)]) == 0
    assert f"seal {stamp}" in capsys.readouterr().out
    assert main(["leaderboard", str(archive)]) == 0
    assert f"`{stamp[:12]}`" in board.read_text()
    board.unlink()
    change(folder / "report.json", '"faulted": 0', '"faulted": 1')
    assert main(["leaderboard", str(archive), str(folder), "--out", str(board)]) == 2
    assert "does not follow" in capsys.readouterr().err and not board.exists()
    assert main(["leaderboard", str(evaluation), "--out", str(board)]) == 2


def test_a_model_card_takes_results_of_its_own_weights(simulation, tmp_path, capsys):
    model = shutil.copytree(Path("checkpoints/tiny"), tmp_path / "model")
    result = shutil.copytree(simulation, tmp_path / "run")
    (model / "README.md").write_text(f"# mine\n{BEGIN}\nold\n{END}\nrest\n")
    assert main(["card", str(model), str(result)]) == 2
    assert "is no simulation of the weights" in capsys.readouterr().err
    for name in ("meta.json", "report.json"):  # as if these weights had played
        about = json.loads((result / name).read_text())
        (result / name).write_text(json.dumps(about | {"checkpoint_sha256": open_checkpoint(model).sha256}))
    assert main(["card", str(model), str(result)]) == 0
    row = "| reach | 100.0 % (34.2 to 100.0), 2 from 40 |"
    head = f"# mine\n{BEGIN}\n| within 70 steps | level normal, 14 steps |\n|---|---|\n"
    assert (model / "README.md").read_text() == f"{head}{row}\n{END}\nrest\n"
    about = json.loads((model / "vlm_local.json").read_text())
    assert about["results"].pop("checkpoint_sha256") == open_checkpoint(model).sha256
    before = json.loads(Path("checkpoints/tiny/vlm_local.json").read_text())
    assert before | {"results": about["results"]} == about
    told = about["results"]["level normal, 14 steps"]["reach"]
    assert (told["success"], told["episodes"], told["max_steps"]) == (1.0, 2, 14)
    assert main(["card", str(model), str(result), str(result)]) == 2
    for text in ("no marks", f"# mine\n{BEGIN}\nold\nrest"):
        (model / "README.md").write_text(text)
        assert main(["card", str(model), str(result)]) == 2
        assert (model / "README.md").read_text() == text
    (model / "README.md").unlink()
    assert main(["card", str(model), str(result)]) == 0
    assert (model / "README.md").read_text() == head.replace("mine\n", "model\n\n") + f"{row}\n{END}\n"
