"""A study from end to end: rows, a report with pictures, frozen sets, evidence."""

import json
import shutil

import pytest

from vlm_local.assembly import open_policies
from vlm_local.cli import main
from vlm_local.errors import ConfigError, DataError
from vlm_local.lab.evidence.archive import pack
from vlm_local.lab.evidence.verify import verify
from vlm_local.lab.spatial.run import run_study
from vlm_local.lab.spatial.scenes import CHANGES
from vlm_local.lab.spatial.sets import Gallery, SceneSet, require_frozen
from vlm_local.policy_options import PolicyOptions


def study(out, *arguments) -> int:
    return main(["spatial", "--policy", "move left", "--out", str(out), *map(str, arguments)])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("spatial") / "out"
    assert study(out, "--scenes", 2, "--level", "easy", "--seed", 4) == 0
    return out


def test_a_policy_that_always_goes_left(result):
    report = json.loads((result / "report.json").read_text())
    rows = [json.loads(line) for line in (result / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (1 + len(CHANGES)) and not report["frozen"]
    assert report["turned"]["value"] == report["moved"]["value"] == 0
    assert report["changes"]["blank"]["axes"]["y"]["value"] == 1 and report["changes"]["blank"]["value"] == 1 / 6
    page = (result / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 * 24  # the worst pairs, before and after
    assert "scene mirrored" in page and "no answer is right" in page


@pytest.mark.slow
def test_a_frozen_set_is_drawn_again_bit_for_bit_or_refused(result, tmp_path, capsys):
    frozen = tmp_path / "set.json"
    frozen.write_bytes((result / "set.json").read_bytes())
    assert study(tmp_path / "again", "--set", frozen) == 0
    assert (tmp_path / "again" / "rows.jsonl").read_bytes() == (result / "rows.jsonl").read_bytes()
    assert json.loads((tmp_path / "again" / "report.json").read_text())["frozen"]
    told = json.loads(frozen.read_text())
    frozen.write_text(json.dumps(told | {"images_sha256": "0" * 64}))
    assert study(tmp_path / "other", "--set", frozen) == 2
    assert "the pictures of this set" in capsys.readouterr().err and not (tmp_path / "other/report.json").exists()
    other = SceneSet(**told | {"scenes_sha256": "0" * 64})
    gallery = Gallery(other, drawn=False)  # of which no picture is needed
    list(gallery.show_all())
    with pytest.raises(ConfigError, match="the scenes of this set"):
        require_frozen(other, gallery.frozen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--level", "hardest"), "level must be one of"),
        (("--set", "missing.json"), "is no set of scenes"),
        (("--set", "missing.json", "--seed", 3), "--seed cannot be chosen with --set"),
    ],
)
def test_what_makes_no_sense_is_a_sentence(arguments, message, tmp_path, capsys):
    assert study(tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("scenes", ["1", "2.5", "NaN", '"4"'])
def test_a_set_with_a_number_of_scenes_that_is_none_is_refused(scenes, tmp_path, capsys):
    (tmp_path / "set.json").write_text(f'{{"level": "easy", "seed": 0, "scenes": {scenes}}}')
    assert study(tmp_path / "out", "--set", tmp_path / "set.json") == 2
    assert "2 scenes or more" in capsys.readouterr().err


@pytest.mark.slow
def test_scenes_may_be_added_to_a_finished_study_and_none_left_out(result, tmp_path, capsys):
    out = shutil.copytree(result, tmp_path / "out")
    same = ("--level", "easy", "--seed", 4)
    assert study(out, *same, "--scenes", 3) == 0
    assert (out / "rows.jsonl").read_bytes().startswith((result / "rows.jsonl").read_bytes())
    assert json.loads((out / "report.json").read_text())["scenes"] == 3
    assert verify(out).num_numbers > 0
    assert study(out, *same, "--scenes", 2) == 2
    assert "holds rows of 3 scenes" in capsys.readouterr().err
    assert verify(out).num_numbers > 0, "what is refused changes nothing"


class StoppedAfter:
    """A policy that always goes left, until somebody presses Ctrl-C."""

    def __init__(self, num_views):
        self._left = num_views
        self._policies = open_policies(PolicyOptions(model="move left"))
        self._policy = self._policies.build("spatial", tell_all=True)
        self.metadata, self.reset = self._policy.metadata, self._policy.reset

    def act(self, observation):
        if not self._left:
            self._policies.close()
            raise KeyboardInterrupt
        self._left -= 1
        return self._policy.act(observation)


@pytest.mark.slow
def test_a_study_that_was_stopped_goes_on_where_it_was(result, tmp_path, capsys):
    scene_set, out = SceneSet("easy", 4, 2), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run_study("move left", StoppedAfter(7), scene_set, out)
    rows = out / "rows.jsonl"
    assert rows.read_bytes().count(b"\n") == 7
    rows.write_bytes(rows.read_bytes()[:-10])  # and killed in the middle of a line
    with pytest.raises(KeyboardInterrupt):
        run_study("move left", StoppedAfter(3), scene_set, out)
    assert rows.read_bytes().count(b"\n") == 9
    same = ("--scenes", 2, "--level", "easy", "--seed", 4)
    for changes, said in (
        (("--seed", 5), "seed was 4 and is 5"),
        (("--policy", "stop"), 'name was "move left" and is "stop"'),
        (("--temperature", 2), "temperature was 1.0 and is 2.0"),
    ):
        assert study(out, *same, *changes) == 2
        assert f"holds a result with other settings: {said}" in capsys.readouterr().err
    assert study(out, *same) == 0
    assert rows.read_bytes() == (result / "rows.jsonl").read_bytes()
    ours, whole = (json.loads((folder / "report.json").read_text()) for folder in (out, result))
    assert ours == whole


def test_a_study_that_was_changed_does_not_go_on(tmp_path, capsys):
    same = ("--scenes", 2, "--level", "easy", "--seed", 4)
    with pytest.raises(KeyboardInterrupt):
        run_study("move left", StoppedAfter(2), SceneSet("easy", 4, 2), tmp_path / "out")
    rows = tmp_path / "out" / "rows.jsonl"
    kept = rows.read_text()
    for text, said in (
        (kept.replace('"scene": 0', '"scene": 1'), "other scenes"),
        ("{}\n", "other scenes"),
        ("?\n", "line 1"),
    ):
        rows.write_text(text)
        assert study(tmp_path / "out", *same) == 2
        assert said in capsys.readouterr().err


def test_a_study_is_evidence(result, tmp_path):
    archive = tmp_path / "study.zip"
    assert "report.html" not in pack(result, archive)["files"]
    assert verify(archive).report["turned"]["value"] == 0
    rows = result / "rows.jsonl"
    kept = rows.read_text()
    try:
        for old, new, message in (
            ('"y": [0.0, 0.0, 1.0]', '"y": [1.0, 0.0, 0.0]', "does not follow"),
            ('"y": [0.0, 0.0, 1.0]', '"y": [0.0, 0.0, 2.0]', "add up to 1"),
            ('"y": [0.0, 0.0, 1.0]', '"y": [NaN, NaN, NaN]', "add up to 1"),  # which would be in no score
            ('"y": [0.0, 0.0, 1.0]', '"y": [0.0, 0.0, 0.0, 1.0]', "add up to 1"),
            ('"instruction": "reach', '"instruction": "please reach', "but the row says .*'please reach"),
            ('"right": "move', '"right": "do not move', "but the row says .*'do not move"),
        ):
            rows.write_text(kept.replace(old, new, 1))
            with pytest.raises(DataError, match=message):
                verify(result)
    finally:
        rows.write_text(kept)


def test_the_leaderboard_has_a_row_of_it(result, tmp_path):
    board = tmp_path / "board.md"
    assert main(["leaderboard", str(result), "--out", str(board)]) == 0
    title, row = (line for line in board.read_text().splitlines() if line.startswith(("### ", "| move left")))
    assert title == "### 2 scenes of level easy, seed 4, not a frozen set"
    left = json.loads((result / "report.json").read_text())["left"]["value"]
    assert f"| 0.00 | 0.00 | {left:.2f} |" in row  # two scenes that agree have no interval
