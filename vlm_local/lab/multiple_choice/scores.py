"""Answers to a benchmark's questions -> scores. Needs no model.

A row has, beside what lab/asked.py says: category, choices, sha256 of the pictures, and blind, the answer to grey ones.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.lab.asked import Row
from vlm_local.lab.comparison import compare
from vlm_local.lab.multiple_choice.trials import build_trials
from vlm_local.lab.statistics import calibrate


def score_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """All scores, JSON values only.

    measures: of all questions, then of each category: the share of right answers to the pictures ("seeing") and to grey
    ones ("blind"), {value, interval} each, and "difference", {value, interval, p_value}, as `comparison.compare` finds
    them. chance: what guessing reaches. said, right: how often each choice was the answer, and the right one.
    """
    compared = compare([build_trials(rows, said, {}) for said in ("answer", "blind")], ("seeing", "blind"))
    return {
        "questions": len(rows),
        "pictures": compared["units"],
        "failed": sum(row["answer"] is None for row in rows),
        "chance": float(np.mean([1 / len(row["choices"]) for row in rows])),
        "measures": list(map(_describe, compared["measures"])),
        "said": _count(row["answer"] for row in rows if row["answer"] is not None),
        "right": _count(row["label"] for row in rows),
        "calibration": _calibrate(rows),
    }


def _describe(measure: Mapping[str, Any]) -> dict[str, Any]:
    (seeing, blind), (pair,) = measure["scores"], measure["pairs"]
    difference = {"value": pair["difference"], "interval": pair["interval"], "p_value": pair["p_value"]}
    told = {name: measure[name] for name in ("name", "group", "n")}
    return {**told, "seeing": seeing, "blind": blind, "difference": difference}


def _count(choices: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(choices).items()))


def _calibrate(rows: Sequence[Row]) -> dict[str, Any] | None:
    told = [row for row in rows if row["probabilities"]]
    if not told:
        return None
    given = np.array([row["probabilities"][row["answer"]] for row in told])
    return calibrate(given, np.array([row["answer"] == row["label"] for row in told]))
