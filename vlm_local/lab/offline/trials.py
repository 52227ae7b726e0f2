"""The steps of an evaluation, to be compared with those of others."""

from pathlib import Path

import numpy as np

from vlm_local.lab.comparison import Measure, Trials, describe_making, read_report, stack_scores
from vlm_local.lab.offline.rows import Rows, load_rows
from vlm_local.types import AXES

_MEASURES = (Measure("exact"), Measure("moving"), *(Measure(axis, group="axis") for axis in AXES))


def load_trials(folder: Path) -> Trials:
    """folder: the --out of `eval`. Raises DataError for one without rows."""
    report = read_report(folder)
    return build_trials(load_rows(folder), describe_making(report, report.get("policy", {})))


def build_trials(rows: Rows, about: dict) -> Trials:
    """Scores: "exact", the same of "moving" steps, and the right sign of each axis; no answer is a wrong one.

    Which data set, camera and steps were read is not compared: steps of other data have other labels.
    """
    episodes = rows.episode_ids[rows.episode]
    right = rows.answered[:, None] & (rows.answer == rows.label)  # (N, 6)
    exact, moving, always = right.all(axis=1), rows.label.any(axis=1), np.ones(len(rows))
    scores = {"exact": (exact, always), "moving": (exact & moving, moving)}
    scores |= {axis: (right[:, column], always) for column, axis in enumerate(AXES)}
    return Trials(
        kind="eval",
        noun="step",
        truth_noun="label",
        settings={},
        about=about,
        measures=_MEASURES,
        keys=[f"episode {episode}, step {step}" for episode, step in zip(episodes, rows.step, strict=True)],
        units=episodes,
        truths=rows.label_phrases,
        scores=stack_scores(scores),
    )
