"""Rows of a tuning -> scores, differences and the choice among variants. Episodes are the independent units."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.lab.statistics import adjust_holm, bootstrap_ratio, compare_sums, widen_certain

MAX_P = 0.05  # a variant is kept below this: Holm's over the variants of its rung

Rows = Sequence[Mapping[str, Any]]  # of one setting, an episode each: episode, steps, log_loss, right


def describe(rows: Rows, seed: int) -> dict[str, Any]:
    """Means over steps with their intervals: log_loss, log_loss_interval, accuracy, accuracy_interval, steps, episodes.

    accuracy: share of steps whose phrase has the label's direction.
    """
    losses, right, steps = _sum_up(rows)
    accuracy_interval = bootstrap_ratio(right, steps, seed)
    return {
        "log_loss": float(losses.sum() / steps.sum()),
        "log_loss_interval": bootstrap_ratio(losses, steps, seed),
        "accuracy": float(right.sum() / steps.sum()),
        "accuracy_interval": accuracy_interval and widen_certain(accuracy_interval, len(steps)),
        "steps": int(steps.sum()),
        "episodes": len(rows),
    }


def compare(ours: Rows, theirs: Rows, seed: int) -> dict[str, Any]:
    """What `ours` has more, step by step, with intervals over episodes: log_loss, accuracy, each with _interval.

    p_value: two-sided, of the log-loss. p_better: one-sided, that so much less comes from chance.
    """
    if [(row["episode"], row["steps"]) for row in ours] != [(row["episode"], row["steps"]) for row in theirs]:
        raise DataError("two settings were not asked about the same steps, so a picture was read once and not again")
    (losses, right, steps), (their_losses, their_right, _) = _sum_up(ours), _sum_up(theirs)
    loss = compare_sums(losses, their_losses, steps, seed)
    accuracy = compare_sums(right, their_right, steps, seed)
    p_value = loss["p_value"]
    return {
        "log_loss": loss["difference"],
        "log_loss_interval": loss["interval"],
        "p_value": p_value,
        "p_better": p_value / 2 if loss["difference"] < 0 else 1 - p_value / 2,  # swaps are symmetric about 0
        "accuracy": accuracy["difference"],
        "accuracy_interval": accuracy["interval"],
    }


def choose(differences: Sequence[dict[str, Any]]) -> int | None:
    """Index of the variant with the least log-loss of those that are better than chance; None where none is.

    Adds p_holm to each.
    """
    for each, adjusted in zip(differences, adjust_holm([each["p_better"] for each in differences]), strict=True):
        each["p_holm"] = adjusted
    better = [index for index, each in enumerate(differences) if each["p_holm"] < MAX_P]
    return min(better, key=lambda index: differences[index]["log_loss"], default=None)


def summarise_times(base_ms: Sequence[float], ms: Sequence[float]) -> dict[str, Any] | None:
    """Medians and their ratio; None where no step was timed."""
    if not ms:
        return None
    base, own = float(np.median(base_ms)), float(np.median(ms))
    return {"ratio": own / base, "ms": own, "base_ms": base, "n": len(ms)}


def _sum_up(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of log-loss, right answers and steps, float (E,) each."""
    sums = [[sum(row["log_loss"]), sum(row["right"]), len(row["steps"])] for row in rows]
    losses, right, steps = np.array(sums, dtype=np.float64).T
    if not steps.sum():
        raise DataError("no picture of these episodes can be read")
    return losses, right, steps
