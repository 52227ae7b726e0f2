"""The questions of a benchmark as trials: a model's answers beside those of another, or beside its own blind ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines
from vlm_local.lab.asked import Row
from vlm_local.lab.comparison import OVERALL, Measure, Trials, describe_making, read_report, stack_scores

_ALL = "all questions"


def load_trials(folder: Path) -> Trials:
    """folder: the --out of `eval-choices`. Raises DataError for one whose rows are not those of its report."""
    report = read_report(folder)
    about = describe_making(report, report["policy"])
    return build_trials(load_rows(folder, report), "answer", about, {"data": report["data"]})


def load_rows(folder: Path, report: Mapping[str, Any]) -> list[Row]:
    """Raises DataError where they are not those of the report."""
    rows = list(read_json_lines(folder / "rows.jsonl"))
    if len(rows) != report["questions"]:
        raise DataError(
            f"{folder} has {len(rows)} rows and a report of {report['questions']}: it was stopped on its way, and the "
            "same `eval-choices` again finishes it; or its questions were changed, and it needs another --out"
        )
    return rows


def build_trials(
    rows: Sequence[Row], said: str, about: Mapping[str, Any], conditions: Mapping[str, Any] | None = None
) -> Trials:
    """Scores: the share of right answers, and the same of each category. No answer is a wrong one.

    said: field of the rows that counts, "answer" or "blind". Questions about the same pictures are one unit.
    """
    right = np.array([row[said] == row["label"] for row in rows])
    categories = np.array([row["category"] for row in rows])
    _, units = np.unique([row["sha256"] for row in rows], return_inverse=True)
    scores = {_ALL: (right, np.ones(len(rows)))}
    for name in sorted(set(categories)) if len(set(categories)) > 1 else []:
        of_category = categories == name
        scores[f"{name} (category)" if name == _ALL else str(name)] = (right & of_category, of_category)
    return Trials(
        kind="eval-choices",
        noun="question",
        truth_noun="question",
        unit_noun="picture",
        settings={},
        about=about,
        measures=[Measure(name, OVERALL if name == _ALL else "category") for name in scores],
        keys=[f"index {row['index']}" for row in rows],
        units=units,
        truths=[f"{row['label']} ({row['category']}: {row['question']})" for row in rows],
        scores=stack_scores(scores),
        conditions=conditions or {},
    )
