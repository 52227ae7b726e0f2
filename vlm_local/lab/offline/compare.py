"""Two evaluations on the steps that both answered."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.lab.formats import format_p, format_points, format_share, format_span
from vlm_local.lab.offline.rows import Rows
from vlm_local.lab.offline.tally import tally_phrases
from vlm_local.lab.statistics import compare_sums
from vlm_local.types import AXES


def compare_rows(ours: Rows, theirs: Rows, seed: int = 0) -> dict[str, Any]:
    """Both evaluations on the steps they share: "steps", and the comparison of "exact", "moving" and each axis.

    Each comparison is `statistics.compare_sums` with the shares "ours" and "theirs" and the number of "steps", or None
    without a step. Raises DataError where no step is shared or a label differs: then the data differ.
    """
    ours, theirs = _align(ours, theirs)
    a, b = (tally_phrases(rows, rows.answer, rows.answered) for rows in (ours, theirs))
    result = {
        "steps": len(ours),
        "exact": _side_by_side(a["exact"][:, 0], b["exact"][:, 0], a["steps"][:, 0], seed),
        "moving": _side_by_side(a["exact"][:, 1], b["exact"][:, 1], a["steps"][:, 1], seed),
    }
    steps = a["steps"][:, 0]
    right_a, right_b = (np.diagonal(sums["confusion"], axis1=-2, axis2=-1).sum(axis=-1) for sums in (a, b))  # (E, 6)
    for column, axis in enumerate(AXES):
        result[axis] = _side_by_side(right_a[:, column], right_b[:, column], steps, seed)
    return result


def _side_by_side(ours: np.ndarray, theirs: np.ndarray, steps: np.ndarray, seed: int) -> dict[str, Any] | None:
    """None where there is no step to compare."""
    if not steps.sum():
        return None
    shares = {"ours": float(ours.sum() / steps.sum()), "theirs": float(theirs.sum() / steps.sum())}
    return shares | {"steps": int(steps.sum())} | compare_sums(ours, theirs, steps, seed)


def _align(ours: Rows, theirs: Rows) -> tuple[Rows, Rows]:
    """Both reduced to the steps they share, in the same order."""
    places = []
    for rows in (ours, theirs):
        ids = rows.episode_ids[rows.episode]
        places.append({key: index for index, key in enumerate(zip(ids.tolist(), rows.step.tolist(), strict=True))})
    shared = [key for key in places[0] if key in places[1]]
    if not shared:
        raise DataError("the two evaluations share no step; both must be of the same data set")
    a, b = (rows.select([place[key] for key in shared]) for rows, place in zip((ours, theirs), places, strict=True))
    differing = (a.label != b.label).any(axis=1)
    if differing.any():
        episode, step = shared[int(differing.argmax())]
        raise DataError(
            f"the two evaluations disagree on {int(differing.sum())} of {len(shared)} labels, first on episode "
            f"{episode}, step {step}; both must be of the same data set"
        )
    return a, b


def format_comparison(result: Mapping[str, Any], ours: str, theirs: str) -> str:
    """`compare_rows` as a table for a terminal; a line is a score."""
    lines = [
        f"A {ours}\nB {theirs}\n{result['steps']} shared steps; A - B in percentage points\n",
        f"{'':10}{'steps':>7}{'A':>9}{'B':>9}{'A - B':>9}  {'95 %':>16}{'p':>8}",
    ]
    for name, scores in result.items():
        if name == "steps":
            continue
        if scores is None:
            lines.append(f"{name:10}{0:7}")
            continue
        shares = "".join(f"{format_share(scores[whose]):>9}" for whose in ("ours", "theirs"))
        difference = format_points(scores["difference"], 1, "+")
        interval = format_span(scores["interval"], 1, "+")
        lines.append(
            f"{name:10}{scores['steps']:7}{shares}{difference:>9}  {interval:>16}{format_p(scores['p_value']):>8}"
        )
    lines.append("\nexact, moving: phrases that are right; axes: signs that are right")
    lines.append("p: permutation test over episodes, two-sided, one test a line")
    return "\n".join(lines)
