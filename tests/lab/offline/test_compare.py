import itertools

import numpy as np
import pytest

from vlm_local.errors import DataError
from vlm_local.lab.offline.compare import compare_rows, compare_sums
from vlm_local.lab.offline.rows import build_rows


def _rows(answers, labels=None, first_episode=0):
    """Rows of an array of answers (E, T) to labels that are all "stop"."""
    return build_rows(
        [
            {
                "episode": first_episode + episode,
                "step": step,
                "instruction": "go",
                "label": labels[episode][step] if labels else "stop",
                "phrase": phrase,
                "full_window": True,
            }
            for episode, phrases in enumerate(answers)
            for step, phrase in enumerate(phrases)
        ]
    )


def test_the_p_value_is_that_of_all_swaps_of_episodes():
    random = np.random.default_rng(0)
    ours, theirs = random.integers(0, 9, (2, 8)).astype(float)
    lead = ours - theirs
    swaps = [abs(np.dot(signs, lead)) >= abs(lead.sum()) for signs in itertools.product((1, -1), repeat=8)]
    assert compare_sums(ours, theirs, np.full(8, 10.0))["p_value"] == pytest.approx(np.mean(swaps))


def test_many_episodes_give_nearly_the_same_p_value_by_random_swaps():
    random = np.random.default_rng(1)
    lead = random.normal(0.15, 1, 200)
    result = compare_sums(lead, np.zeros(200), np.ones(200))
    statistic = lead.sum() / np.sqrt((lead**2).sum())
    expected = np.mean(np.abs(random.normal(size=200_000)) >= abs(statistic))
    assert result["p_value"] == pytest.approx(expected, abs=0.02)
    assert compare_sums(lead, np.zeros(200), np.ones(200)) == result


def test_equal_policies_differ_by_nothing():
    result = compare_sums(np.array([3.0, 4]), np.array([3.0, 4]), np.array([5.0, 5]))
    assert (result["difference"], result["p_value"], result["interval"]) == (0, 1, [0, 0])


def test_two_evaluations_are_compared_on_the_steps_they_share():
    ours = _rows([["stop", "stop", "move up"]] * 4)
    theirs = _rows([["move up", "stop", "move left"]] * 5, first_episode=1)
    result = compare_rows(ours, theirs)
    assert result["steps"] == 9
    assert result["exact"]["ours"] == pytest.approx(2 / 3)
    assert result["exact"]["difference"] == pytest.approx(1 / 3)
    assert result["exact"]["p_value"] == 2 / 2**3
    assert result["z"]["difference"] == 0 and result["y"]["difference"] == pytest.approx(1 / 3)
    assert result["moving"] is None


def test_evaluations_of_different_data_are_refused():
    with pytest.raises(DataError, match="share no step"):
        compare_rows(_rows([["stop"]]), _rows([["stop"]], first_episode=1))
    with pytest.raises(DataError, match="disagree on 1 of 2 labels, first on episode 0, step 1"):
        compare_rows(_rows([["stop", "stop"]]), _rows([["stop", "stop"]], labels=[["stop", "move up"]]))
