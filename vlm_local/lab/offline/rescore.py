"""The report of `eval`, once more from its rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines, read_json_object
from vlm_local.lab.offline.rows import Rows, hash_labels, load_rows
from vlm_local.lab.offline.scores import score_rows
from vlm_local.lab.offline.tally import GRIPPER_TOLERANCE_STEPS
from vlm_local.primitives import WINDOW
from vlm_local.provenance import HOW_MADE

# What rows cannot show: how the answers were made, and what could not be read.
_STATED = ("data", "left_out", *HOW_MADE)
_ROUNDED = 1e-5  # how far a probability may be outside of 0 to 1


def rescore(folder: Path, report: dict[str, Any], progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the report must be: fields that were scored again, and fields that only say how it was made."""
    made = read_json_object(folder / "evaluation.json")
    plan = made["plan"]
    rows = load_rows(folder)
    _check_rows(rows, list(read_json_lines(folder / "episodes.jsonl")), plan["every"])
    stated = {name: report[name] for name in _STATED if name in report}
    stated |= {"policy": {"name": plan["policy"], **made.get("policy", {})}, "answer_ms": made.get("answer_ms")}
    scored = score_rows(rows, plan["seed"]) | {
        "seed": plan["seed"],
        "labels_sha256": hash_labels(rows),
        "gripper_tolerance_steps": GRIPPER_TOLERANCE_STEPS,
    }
    return scored, stated


def _check_rows(rows: Rows, finished: Sequence[Mapping[str, Any]], every: int) -> None:
    """Raises DataError where the rows are not those of the finished episodes: every step that was asked, once."""
    asked: dict[tuple[int, int], bool] = {}  # (episode, step) -> whether its window was full
    for line in finished:
        left_out = set(map(int, line.get("unscored", ())))
        steps = () if line.get("left_out") else range(0, line["steps"], every)
        asked |= {(line["episode"], step): step + WINDOW <= line["steps"] for step in steps if step not in left_out}
    places = list(zip(rows.episode_ids[rows.episode].tolist(), rows.step.tolist(), strict=True))
    if places != sorted(asked):
        episode, step = min(set(asked) ^ set(places), default=places[0])
        raise DataError(
            f"rows.jsonl has not every step once that episodes.jsonl names, first at episode {episode}, step {step}"
        )
    labels = dict(zip(places, rows.label_phrases, strict=True))
    for place, previous, is_full in zip(places, rows.previous_phrases, rows.full_window.tolist(), strict=True):
        before = labels.get((place[0], place[1] - 1), previous if place[1] else None)
        if (previous, is_full) != (before, asked[place]):
            raise DataError(
                f"rows.jsonl: the previous label or the window of episode {place[0]}, step {place[1]} is not as its "
                "neighbours say"
            )
    told = np.append(rows.probability, rows.marginals)
    if np.any((told < -_ROUNDED) | (told > 1 + _ROUNDED)):
        raise DataError("rows.jsonl has probabilities outside of 0 to 1")
