"""Comparisons of known answers, and what their intervals and p-values promise on drawn data."""

from dataclasses import replace

import numpy as np
import pytest

from vlm_local.errors import DataError
from vlm_local.lab.comparison import Measure, Trials, compare, format_comparison
from vlm_local.lab.offline.rows import build_rows
from vlm_local.lab.offline.trials import build_trials


def _answer(answers, labels=None, first_episode=0, instruction="go", conditions=None) -> Trials:
    """An array of answers (E, T) to labels that are all "stop"."""
    rows = [
        {
            "episode": first_episode + episode,
            "step": step,
            "instruction": instruction,
            "label": labels[episode][step] if labels else "stop",
            "phrase": phrase,
            "full_window": True,
        }
        for episode, phrases in enumerate(answers)
        for step, phrase in enumerate(phrases)
    ]
    return build_trials(build_rows(rows), {"policy": {}}, conditions)


def _win(won, keys=None) -> Trials:
    """Episodes that were won or lost."""
    keys = [f"seed {seed}" for seed in range(len(won))] if keys is None else keys
    scores = {"success": np.stack([won, np.ones(len(won))], axis=1).astype(float)}
    measures = (Measure("success"),)
    return Trials(
        "sim", "episode", "scene", {"level": "easy"}, {"policy": {}}, measures, keys, np.array(keys), keys, scores
    )


def _find(result, name):
    return next(measure for measure in result["measures"] if measure["name"] == name)


def test_two_evaluations_are_compared_on_the_steps_they_share():
    ours = _answer([["stop", "stop", "move up"]] * 4)
    theirs = _answer([["move up", "stop", "move left"]] * 5, first_episode=1)
    result = compare([ours, theirs], ["ours", "theirs"])
    assert (result["trials"], result["units"]) == (9, 3)
    exact, (pair,) = _find(result, "exact"), _find(result, "exact")["pairs"]
    assert exact["scores"][0]["value"] == pytest.approx(2 / 3)
    assert pair["difference"] == pytest.approx(1 / 3) and pair["p_value"] == pair["p_holm"] == 2 / 2**3
    assert _find(result, "z")["pairs"][0]["difference"] == 0
    assert _find(result, "y")["pairs"][0]["difference"] == pytest.approx(1 / 3)
    assert _find(result, "moving")["n"] == 0 and not _find(result, "moving")["pairs"]


def test_evaluations_of_different_data_are_refused():
    with pytest.raises(
        DataError, match=r"share no step.*a has episode 0, step 0 to episode 0, step 0; b has episode 1"
    ):
        compare([_answer([["stop"]]), _answer([["stop"]], first_episode=1)], ["a", "b"])
    other = _answer([["stop", "stop"]], labels=[["stop", "move up"]])
    with pytest.raises(DataError, match="a and b disagree on 1 of 2 labels, first on episode 0, step 1"):
        compare([_answer([["stop", "stop"]]), other], ["a", "b"])


def test_evaluations_of_other_instructions_are_refused():
    with pytest.raises(DataError, match=r"a and b disagree on 1 of 1 labels.*stop \(go\).*stop \(come\)"):
        compare([_answer([["stop"]]), _answer([["stop"]], instruction="come")], ["a", "b"])


def test_what_differs_beside_the_policy_is_told():
    """Else a difference between cameras reads as one between models."""
    seen = [_answer([["stop"]], conditions={"data": "bridge", "camera": name}) for name in ("front", "front", "wrist")]
    said = format_comparison(compare(seen, ["a", "b", "c"]))
    assert "data bridge" in said and "Differs: camera: front in a, b; wrist in c." in said
    assert "Differs" not in format_comparison(compare(seen[:2], ["a", "b"]))


def test_what_differs_in_policies_and_versions_is_told_in_short():
    def make(contrast: float, version: str, commit: str) -> Trials:
        policy = {"engine": "local", "contrast": contrast, "prompt": {"name": "chat", "sha256": commit * 64}}
        about = {"policy": policy, "versions": {"torch": version}, "git": commit * 40 + "+"}
        return replace(_win([1, 0]), about=about)

    ours, theirs, baseline = make(0.5, "2.0", "a"), make(0.0, "2.1", "b"), _win([0, 0])
    said = format_comparison(compare([ours, theirs, baseline], ["a", "b", "c"]))
    assert [line for line in said.splitlines() if line.startswith("Differs")] == [
        "Differs: contrast: 0.5 in a; 0.0 in b.",
        f"Differs: prompt sha256: {'a' * 12} in a; {'b' * 12} in b.",
        "Differs: version of torch: 2.0 in a; 2.1 in b.",
        f"Differs: commit: {'a' * 12}+ in a; {'b' * 12}+ in b.",
    ]


def test_episodes_that_faulted_are_told():
    """Without them a policy that fails where it is hard looks better than one that answers."""
    said = format_comparison(compare([_win([1, 0, 0]), replace(_win([1]), left_out=2)], ["a", "b"]))
    assert "1 shared episodes of up to 3" in said and "Left out as faulted: 2 of 3 episodes of b." in said


def test_what_stop_alone_scores_is_told():
    """An axis that hardly ever moves is right for a policy that never moves it."""
    result = compare([_answer([["move up"] * 4], labels=[["stop", "stop", "stop", "move up"]])] * 2, ["a", "b"])
    assert _find(result, "z")["floor"] == 0.75 and _find(result, "exact")["floor"] == 0.75
    assert '"stop" alone scores: exact 75.0 %, x 100.0 %, y 100.0 %, z 75.0 %' in format_comparison(result)


def test_three_results_are_compared_on_what_all_have_and_adjusted_over_their_pairs():
    won = [_win([1] * 8), _win([0] * 10), _win([1] * 7 + [0])]
    result = compare(won, ["a", "b", "c"])
    (measure,) = result["measures"]
    assert result["trials"] == 8 and [score["value"] for score in measure["scores"]] == [1, 0, 0.875]
    assert [(pair["first"], pair["second"]) for pair in measure["pairs"]] == [("A", "B"), ("A", "C"), ("B", "C")]
    p_values = [2 / 2**8, 1.0, 2 / 2**7]
    assert [pair["p_value"] for pair in measure["pairs"]] == p_values
    assert [pair["p_holm"] for pair in measure["pairs"]] == [3 * p_values[0], 1.0, 2 * p_values[2]]
    assert all(low < high for low, high in (score["interval"] for score in measure["scores"]))  # not 1 to 1


def test_intervals_of_a_paired_difference_hold_what_they_promise():
    random, held, rejected, num_draws = np.random.default_rng(0), 0, 0, 400
    for _ in range(num_draws):
        scene = random.random(40)  # hard scenes are hard for both
        ours, theirs = scene + 0.3 * random.random(40) < 0.7, scene + 0.3 * random.random(40) < 0.7
        (pair,) = compare([_win(ours), _win(theirs)], ["a", "b"])["measures"][0]["pairs"]
        held += pair["interval"][0] <= 0 <= pair["interval"][1]
        rejected += pair["p_value"] < 0.05
    assert held / num_draws > 0.92
    assert rejected / num_draws < 0.08
