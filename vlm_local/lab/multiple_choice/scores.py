"""Answers to a benchmark's questions -> scores. Needs no model.

A row: category, choices, label, sha256 of the pictures, answer (None for a failure), probabilities {choice: p} or None,
and blind, the answer to grey pictures.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from vlm_local.lab.comparison import compare
from vlm_local.lab.multiple_choice.trials import Row, build_trials
from vlm_local.lab.statistics import calibrate

NAMES = ("pictures", "grey")  # what was shown


def score_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """All scores, JSON values only.

    measures: as `comparison.compare` has them, of the answers to the pictures and to grey ones. chance: what guessing
    reaches. said, right: how often each choice was the answer, and the right one.
    """
    compared = compare([build_trials(rows, said, {"policy": {}}) for said in ("answer", "blind")], NAMES)
    return {
        "questions": len(rows),
        "pictures": compared["units"],
        "failed": sum(row["answer"] is None for row in rows),
        "chance": float(np.mean([1 / len(row["choices"]) for row in rows])),
        "measures": compared["measures"],
        "said": _count(row["answer"] for row in rows if row["answer"] is not None),
        "right": _count(row["label"] for row in rows),
        "calibration": _calibrate(rows),
    }


def _count(choices: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(choices).items()))


def _calibrate(rows: Sequence[Row]) -> dict[str, Any] | None:
    told = [row for row in rows if row["probabilities"]]
    if not told:
        return None
    given = np.array([row["probabilities"][row["answer"]] for row in told])
    return calibrate(given, np.array([row["answer"] == row["label"] for row in told]))
