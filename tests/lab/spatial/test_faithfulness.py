"""Reasoning that decides, that is for show, and that freezes: policies of each kind, on the simulator's scenes."""

import json
import shutil

import numpy as np
import pytest

from tests.tiny_models import tiny_checkpoint
from vlm_local.cli import main
from vlm_local.errors import ConfigError, DataError
from vlm_local.lab.evidence.archive import pack
from vlm_local.lab.evidence.verify import verify
from vlm_local.lab.spatial.faithfulness import ask_cases, check_alone, list_cases, score_cases
from vlm_local.lab.spatial.scenes import NONE
from vlm_local.lab.spatial.sets import Gallery, SceneSet
from vlm_local.primitives import format_phrase
from vlm_local.types import Decision

NUM_SCENES = 8


class Told(Gallery):
    """A gallery, and in `right` the right phrase of each picture that it showed."""

    def __init__(self):
        super().__init__(SceneSet("easy", 3, NUM_SCENES), drawn=False)
        self._shown = []

    def show(self, index, name):
        view = super().show(index, name)
        self._shown.append((view.observation.image, format_phrase(view.signs)))
        return view

    def right(self, image) -> str:
        return next(phrase for shown, phrase in self._shown if shown is image)


class Reasoner:
    """Writes down the right phrase of what it sees, and says what `decide` makes of its reasoning and its eyes."""

    def __init__(self, gallery, decide, writes=lambda scene: True):
        self.metadata = {"think": {"name": "ecot"}}
        self._gallery, self._decide, self._writes = gallery, decide, writes
        self._num = 0

    def reset(self, seed):
        self._reasoning, self._num = None, self._num + 1

    def act(self, observation):
        sees = self._gallery.right(observation.image)
        reasoning, self._reasoning = self._reasoning, sees if self._writes(self._num) else None
        return Decision(np.zeros(7), self._decide(reasoning, sees), extra={"reasoning": reasoning})


@pytest.fixture(scope="module")
def gallery():
    return Told()


@pytest.fixture(scope="module")
def rights(gallery):
    return [format_phrase(gallery.show(index, NONE.name).signs) for index in range(NUM_SCENES)]


def ask(gallery, rights, policy, known=()):
    kept = []
    rows = ask_cases(gallery, policy, rights, lambda views: None, known, kept.append)
    return rows, kept


def count(score) -> tuple[int, int]:
    return score["count"], score["n"]


@pytest.mark.parametrize(
    ("decide", "turns", "freezes"),
    [
        (lambda reasoning, sees: reasoning or sees, NUM_SCENES, NUM_SCENES),  # believes all that it wrote
        (lambda reasoning, sees: sees, 0, 0),  # reasoning is for show
        (lambda reasoning, sees: f"{reasoning}; {sees}", NUM_SCENES, 0),  # both count
    ],
)
def test_what_reasoning_does_is_told_apart(gallery, rights, decide, turns, freezes):
    rows, _ = ask(gallery, rights, Reasoner(gallery, decide))
    scores = score_cases(rows, rights)
    assert count(scores["swapped_turns"]) == (turns, NUM_SCENES)
    assert count(scores["stale_freezes"]) == (freezes, NUM_SCENES) and scores["without"] == 0
    low, high = scores["swapped_turns"]["interval"]
    assert low < turns / NUM_SCENES + 0.01 and high > turns / NUM_SCENES - 0.01 and high - low < 0.4


def test_scenes_about_which_nothing_was_written_count_nowhere(gallery, rights):
    rows, _ = ask(gallery, rights, Reasoner(gallery, lambda reasoning, sees: sees, writes=lambda case: case != 6))
    scores = score_cases(rows, rights)
    assert scores["without"] == 1 and scores["swapped_turns"]["n"] == NUM_SCENES - 1


def test_known_cases_are_not_asked_again_and_others_are_refused(gallery, rights):
    policy = Reasoner(gallery, lambda reasoning, sees: sees)
    rows, kept = ask(gallery, rights, policy)
    assert rows == kept and ask(gallery, rights, policy, rows[:5]) == (rows, rows[5:])
    cases = list(list_cases(rights[:5]))
    assert [case for case in list_cases(rights) if case.scene < 5 and case.name != "swapped"] == [
        case for case in cases if case.name != "swapped"
    ]
    with pytest.raises(ConfigError, match="other scenes"):
        ask(gallery, rights, policy, [rows[0] | {"first": [5, "none"]}])
    with pytest.raises(ValueError, match="each once"):
        score_cases(rows[1:], rights)


def test_nothing_else_of_the_first_view_may_be_shown():
    check_alone({"history": 0})
    with pytest.raises(ConfigError, match="leave out --frames and --history"):
        check_alone({"history": 2, "frames": {"num": 1}})


@pytest.mark.long
def test_a_model_is_asked_behind_its_reasoning_and_verified_again(tmp_path):
    out = tmp_path / "out"
    command = ["spatial", "--policy", str(tiny_checkpoint("qwen2-vl")), "--think", "ecot", "--think-tokens", "6"]
    assert main([*command, "--scenes", "2", "--level", "easy", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["reasoning"]["swapped_turns"]["n"] + report["reasoning"]["without"] <= 2
    assert "Does reasoning decide" in (out / "report.html").read_text()
    pack(out, tmp_path / "good.zip")
    assert verify(tmp_path / "good.zip").report["reasoning"] == report["reasoning"]
    rows = (out / "reasoning.jsonl").read_text().splitlines()
    shutil.copytree(out, tmp_path / "bad")
    (tmp_path / "bad" / "reasoning.jsonl").write_text("\n".join(rows[1:]) + "\n")
    with pytest.raises(DataError, match="each once"):
        verify(tmp_path / "bad")
