import pytest

from vlm_local.errors import DataError
from vlm_local.lab.offline.compare import compare_rows
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
