"""The steps of an evaluation, to be compared with those of others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.lab.comparison import Measure, Trials, describe_making, read_report, stack_scores
from vlm_local.lab.offline.rows import Rows, load_rows
from vlm_local.types import AXES

_MEASURES = (Measure("exact"), Measure("moving"), *(Measure(axis, group="axis") for axis in AXES))


def load_trials(folder: Path) -> Trials:
    """folder: the --out of `eval`. Raises DataError for one without rows."""
    report, rows = read_report(folder), load_rows(folder)
    if len(rows) != report["steps"]:
        raise DataError(
            f"{folder} has {len(rows)} rows and a report of {report['steps']}: it was stopped on its way; the same "
            "`eval` again finishes it"
        )
    conditions = {name: report["data"].get(key) for name, key in (("data", "name"), ("camera", "camera"))}
    conditions["seed"] = report["seed"]
    return build_trials(rows, describe_making(report, report.get("policy", {})), conditions)


def build_trials(rows: Rows, about: Mapping[str, Any], conditions: Mapping[str, Any] | None = None) -> Trials:
    """Scores: "exact", the same of "moving" steps, and the right sign of each axis; no answer is a wrong one.

    The same data set may lie in another place, so its path is not compared: steps of other data have other labels and
    instructions.
    """
    episodes = rows.episode_ids[rows.episode]
    right = rows.answered[:, None] & (rows.answer == rows.label)  # (N, 6)
    exact, moving, always = right.all(axis=1), rows.label.any(axis=1), np.ones(len(rows))
    scores = {"exact": (exact, always), "moving": (exact & moving, moving)}
    scores |= {axis: (right[:, column], always) for column, axis in enumerate(AXES)}
    floors: dict[str, np.ndarray] = {"exact": np.asarray(~moving)}
    floors |= {axis: rows.label[:, column] == 0 for column, axis in enumerate(AXES)}
    return Trials(
        kind="eval",
        noun="step",
        truth_noun="label",
        settings={},
        about=about,
        measures=_MEASURES,
        keys=[f"episode {episode}, step {step}" for episode, step in zip(episodes, rows.step, strict=True)],
        units=episodes,
        truths=[f"{label} ({said})" for label, said in zip(rows.label_phrases, rows.instructions, strict=True)],
        scores=stack_scores(scores),
        conditions={**(conditions or {}), "phrases": "said" if rows.are_said.all() else "read from actions"},
        floors=floors,
    )
