"""Confusion matrices from result folders, and what they predict."""

import json
import shutil

import numpy as np
import pytest

from vlm_local.cli import main
from vlm_local.errors import ConfigError, DataError
from vlm_local.files import write_json
from vlm_local.lab.ceiling.confusion_matrices import CLOSED, OFFLINE, load_confusion_matrices
from vlm_local.lab.ceiling.error_models import ConfusionErrors
from vlm_local.lab.ceiling.play import play_confused
from vlm_local.lab.ceiling.predictions import estimate, predict, score_predictions
from vlm_local.sim.environment import SimEnv
from vlm_local.types import AXES, Primitive

TASK = "close_drawer"


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Four episodes of the oracle, a quarter of its phrases random."""
    out = tmp_path_factory.mktemp("sim") / "noisy"
    plan = ("--task", TASK, "--episodes", "4", "--films", "0", "--max-steps", "70", "--workers", "1")
    assert main(["sim", "--policy", "oracle", "--noise", "0.25", "--level", "easy", "--out", str(out), *plan]) == 0
    return out


def make_evaluation(folder, data, phrase):
    """What `eval` leaves of a policy that always says `phrase`, about the first three steps of each episode."""
    rows = [{"episode": episode, "step": step, "label": "stop", "phrase": phrase} for episode in range(4)
            for step in range(3)]  # fmt: skip
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "episodes.jsonl").write_text("")
    write_json(folder / "evaluation.json", {"plan": {"data": str(data)}})
    write_json(folder / "report.json", {})
    return folder


def test_a_simulation_is_counted_with_the_oracle_beside(noisy):
    confusions = load_confusion_matrices(noisy)
    counts = confusions.counts[TASK]
    steps = [len((noisy / "episodes" / f"{TASK}-{n}" / "steps.jsonl").read_text().splitlines()) for n in range(4)]
    assert confusions.kind == CLOSED and counts.shape == (4, 6, 3, 3)
    assert (counts.sum(axis=(2, 3)) == np.array(steps)[:, None]).all()
    right = counts.sum(axis=0)[:, range(3), range(3)].sum() / counts.sum()
    assert right == pytest.approx(1 - 0.25 * 2 / 3, abs=0.06)  # a random phrase is right on an axis by a third


def test_an_evaluation_of_a_simulation_is_counted_with_the_oracle_of_that_run(noisy, tmp_path):
    confusions = load_confusion_matrices(make_evaluation(tmp_path / "eval", noisy, "move forward"))
    counts = confusions.counts[TASK].sum(axis=0)
    assert confusions.kind == OFFLINE and counts[0, :, 2].sum() == counts[0].sum() == 12
    assert counts[5, 0, 1] > 0  # the oracle closes the gripper where the label would say nothing


def test_a_simulation_that_is_not_there_is_not_taken_for_other_data(noisy, tmp_path):
    folder = make_evaluation(tmp_path / "eval", tmp_path / "moved", "move forward")
    write_json(folder / "report.json", {"data": {"format": "recorded run"}})
    with pytest.raises(DataError, match="which is not there from here"):
        load_confusion_matrices(folder)


def test_other_data_has_labels_and_no_task(tmp_path):
    confusions = load_confusion_matrices(make_evaluation(tmp_path / "eval", tmp_path / "bridge", "move forward"))
    assert list(confusions.counts) == ["any"] and confusions.counts["any"].sum(axis=0)[0, 1].tolist() == [0, 0, 12]


@pytest.mark.parametrize("draw", ["step", "together"])
def test_draws_follow_the_counts_and_the_place(draw):
    counts = np.zeros((6, 3, 3), int)
    counts[0, 2] = 1, 2, 7
    env = SimEnv("reach", "easy", image_size=None)
    env.reset(seed=0)
    drawn = [ConfusionErrors(counts, draw, seed, 70) for seed in range(30)]
    said = [confused.alter(Primitive(x=1, y=-1), step, env.world) for confused in drawn for step in range(70)]
    shares = np.bincount([signs.x + 1 for signs in said]) / len(said)
    assert shares == pytest.approx([0.1, 0.2, 0.7], abs=0.04)
    assert all(signs.y == -1 for signs in said)  # never counted, so always right
    persistent = ConfusionErrors(counts, "place", 0, 70)
    assert len({persistent.alter(Primitive(x=1), step, env.world) for step in range(70)}) == 1


def test_axes_are_wrong_for_themselves_or_in_the_same_steps():
    counts = np.repeat((10 * np.eye(3, dtype=int) + 5)[None], len(AXES), axis=0)  # wrong in two of five steps
    all_wrong = {}
    for draw in ("step", "together"):
        confused = ConfusionErrors(counts, draw, 0, 500)
        said = np.array([confused.alter(Primitive(), step, None) for step in range(500)])
        assert (said != 0).mean() == pytest.approx(0.4, abs=0.05)
        all_wrong[draw] = (said != 0).all(axis=1).mean()
    assert all_wrong["step"] < 0.02 and all_wrong["together"] > 0.35


@pytest.mark.slow
def test_a_known_confusion_is_predicted_within_the_interval():
    """Half of all steps random on x: observed with other chance than predicted."""
    counts = np.repeat(np.eye(3, dtype=int)[None] * 60, len(AXES), axis=0)
    counts[0] = 10 + 30 * np.eye(3, dtype=int)
    won = {
        name: [play_confused(TASK, "easy", seed, counts, "step", 22) is not None for seed in range(first, first + 30)]
        for name, first in (("observed", 500), ("predicted", 0))
    }
    predicted = estimate(won["predicted"])
    assert predicted["interval"][0] <= np.mean(won["observed"]) <= predicted["interval"][1]
    assert 0 < predicted["rate"] < 1


def test_chance_of_the_confusion_widens_the_interval():
    even, uneven = estimate([True, True, False, False, True] * 8), estimate(([True] * 5 + [False] * 5) * 4)
    assert uneven["interval"][1] - uneven["interval"][0] > even["interval"][1] - even["interval"][0]
    assert estimate([True] * 20)["interval"][0] == pytest.approx(0.839, abs=0.001)


def test_a_prediction_is_kept_until_the_answers_change(noisy, tmp_path):
    seeds, played = range(4), []
    first = predict(tmp_path, noisy, noisy, seeds, 1, played.append)
    path = tmp_path / "predictions" / "noisy-from-noisy.json"
    before = path.stat().st_mtime_ns
    assert json.loads(path.read_text()) == predict(tmp_path, noisy, noisy, seeds, 1, played.append)
    assert path.stat().st_mtime_ns == before and sum(played) == 24
    assert first["errors"]["step"][TASK] == abs(first["predicted"][TASK]["step"]["rate"] - first["truth"][TASK]["rate"])
    predict(tmp_path, noisy, noisy, range(2), 1, played.append)
    assert path.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"noise": 0.5}, "noise was 0.25 and is 0.5"),
        ({"env": "metaworld"}, "in metaworld; success within 70 in our simulator"),
        ({"checkpoint_sha256": "b"}, 'checkpoint_sha256 was "a" and is "b"'),
    ],
)
def test_a_policy_is_not_predicted_from_the_answers_of_another(noisy, tmp_path, change, says):
    source, result = (shutil.copytree(noisy, tmp_path / name) for name in ("answers", "played"))
    for folder, told in ((source, {"checkpoint_sha256": "a"}), (result, {"checkpoint_sha256": "a", **change})):
        report = json.loads((folder / "report.json").read_text())
        plan = {name: told.pop(name) for name in ("noise", "env") if name in told}
        write_json(folder / "report.json", report | told | {"simulator": report["simulator"] | plan})
    with pytest.raises(ConfigError, match=says):
        predict(tmp_path, source, result, range(1), 1, lambda num: None)


def test_errors_are_means_over_tasks():
    won = {
        "a": {"step": [True, False], "together": [True, True], "place": [True, True]},
        "b": {"step": [True, True], "together": [True, True], "place": [False, False]},
    }
    scores = score_predictions(won, {"a": {"rate": 1.0}, "b": {"rate": 0.9}})
    assert scores["mean_error"] == pytest.approx({"step": 0.3, "together": 0.05, "place": 0.45})


def test_what_cannot_be_predicted_is_said(noisy, tmp_path):
    evaluation = make_evaluation(tmp_path / "eval", noisy, "stop")
    with pytest.raises(DataError, match="no result of `sim`"):
        predict(tmp_path, evaluation, evaluation, range(2), 1, print)
    with pytest.raises(DataError, match="is no result folder"):
        load_confusion_matrices(tmp_path)
    report = json.loads((noisy / "report.json").read_text())
    short = tmp_path / "short"
    short.mkdir()
    write_json(short / "meta.json", {"simulator": {}})
    write_json(short / "report.json", report | {"simulator": report["simulator"] | {"max_steps": 50}})
    with pytest.raises(ConfigError, match="at most 50 steps"):
        predict(tmp_path, noisy, short, range(2), 1, print)
