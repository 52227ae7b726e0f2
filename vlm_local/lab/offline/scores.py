"""Rows -> scores with intervals. Needs no model and no data set."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlm_local.lab.offline.baselines import NAMES, answer_baseline, find_majority
from vlm_local.lab.offline.rows import Rows, encode_signs
from vlm_local.lab.offline.tally import SPLITS, tally_actions, tally_calibration, tally_phrases
from vlm_local.lab.statistics import compare_sums, draw_weights, find_calibration_gap, find_interval, widen_certain
from vlm_local.types import AXES

MIN_STEPS = 10  # a cell with fewer says its count and no percentage
_NO_SHARES = ("actions", "calibration")  # scores whose names begin so are not a share of something

Sums = Mapping[str, np.ndarray]


def score_rows(rows: Rows, seed: int = 0) -> dict[str, Any]:
    """All scores of an evaluation, JSON values only.

    A score with fewer than MIN_STEPS behind it is None; "counts" has its steps (or events, episodes),
    "intervals" its 95 % interval by bootstrap over episodes, both by dotted name. `exact` is over all
    labelled steps, a missing answer counting as wrong, and is always a number. seed: of `random`, of
    the bootstrap and of the tests.
    """
    phrases = tally_phrases(rows, rows.answer, rows.answered)
    sums = phrases | tally_actions(rows) | tally_calibration(rows)
    report = _summarise(sums, seed)
    report |= {
        "exact": float(phrases["exact"][:, 0].sum() / len(rows)),
        "steps": len(rows),
        "episodes": len(rows.episode_ids),
        "unanswered": int((~rows.answered).sum()),
        "tasks": _score_tasks(rows),
        "reliability": sums["bins"].sum(axis=0)[0].tolist(),
    }
    for column, axis in enumerate(AXES):
        report["axes"][axis]["confusion"] = phrases["confusion"].sum(axis=0)[column].astype(int).tolist()
    report["baselines"] = {name.replace("-", "_"): _score_baseline(rows, name, phrases, seed) for name in NAMES}
    return report


def _score_baseline(rows: Rows, name: str, model: Sums, seed: int) -> dict[str, Any]:
    """Scores of a baseline on the same steps, and the model's lead over it."""
    majority = find_majority(rows.label_phrases)
    steps = list(zip(rows.episode_ids[rows.episode].tolist(), rows.step.tolist(), strict=True))
    said = answer_baseline(name, steps, rows.label_phrases, rows.previous_phrases, majority, seed)
    sums = tally_phrases(rows, encode_signs(said), np.full(len(rows), True))
    report = _summarise(sums, seed)
    report["exact"] = float(sums["exact"][:, 0].sum() / len(rows))
    report["lead"] = compare_sums(model["exact"][:, 0], sums["exact"][:, 0], sums["steps"][:, 0], seed)
    return report | ({"phrase": majority} if name == "majority" else {})


def _score_tasks(rows: Rows) -> list[dict[str, Any]]:
    """Per instruction, commonest first: steps, episodes, exact answers, opposite directions."""
    names, task = np.unique(rows.instructions, return_inverse=True)
    exact = rows.answered & (rows.answer == rows.label).all(axis=1)
    opposite = rows.answered & (rows.answer * rows.label < 0).any(axis=1)
    moving = rows.label.any(axis=1)
    tasks = []
    for index in np.argsort(-np.bincount(task), kind="stable"):
        chosen = task == index
        tasks.append(
            {
                "instruction": str(names[index]),
                "episodes": len(np.unique(rows.episode[chosen])),
                "steps": int(chosen.sum()),
                "exact": _ratio(exact & chosen, chosen),
                "moving_steps": int((moving & chosen).sum()),
                "moving_exact": _ratio(exact & moving & chosen, moving & chosen),
                "opposite_steps": _ratio(opposite & moving & chosen, moving & chosen),
            }
        )
    return tasks


def _ratio(part: np.ndarray, whole: np.ndarray) -> float | None:
    return float(part.sum() / whole.sum()) if whole.sum() >= MIN_STEPS else None


def _summarise(sums: Sums, seed: int) -> dict[str, Any]:
    """Sums per episode -> nested scores, with "counts" and "intervals" by dotted name."""
    whole = {name: values.sum(axis=0) for name, values in sums.items()}
    total = {name: (float(value), int(count)) for name, value, count in _measure(whole)}
    intervals = _bootstrap(sums, seed)
    report: dict[str, Any] = {"counts": {name: count for name, (_, count) in total.items()}, "intervals": {}}
    for name, (value, count) in total.items():
        enough = count >= (1 if name.startswith("actions") else MIN_STEPS)
        *folders, leaf = name.split(".")
        node = report
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value if enough else None
        if enough and name in intervals:
            report["intervals"][name] = intervals[name]
    return report


def _bootstrap(sums: Sums, seed: int) -> dict[str, list[float]]:
    """95 % intervals of every score, its percentiles when episodes are drawn with replacement; none for one episode."""
    num_episodes = len(next(iter(sums.values())))
    if num_episodes < 2:
        return {}
    draws: dict[str, list[np.ndarray]] = {}
    for weights in draw_weights(num_episodes, seed):
        # Resamples are the first axis, but the closest in memory: numpy sums short axes slowly where they are that.
        resampled = {n: np.moveaxis(np.tensordot(values, weights, (0, 1)), -1, 0) for n, values in sums.items()}
        for name, value, _ in _measure(resampled):
            draws.setdefault(name, []).append(value)
    intervals = {name: find_interval(np.concatenate(values)) for name, values in draws.items()}
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    for name, _, counts in _measure(sums):  # of each episode
        if name in known and not name.startswith(_NO_SHARES) and not name.endswith("macro_f1"):
            known[name] = widen_certain(known[name], int((counts > 0).sum()))
    return known


def _measure(sums: Sums) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Sums with any leading axes -> (dotted name, score, number of steps behind it), NaN for 0 / 0."""
    for split, name in enumerate(SPLITS):
        yield (
            ("exact" if name == "all" else f"{name}.exact"),
            *_divide(sums["exact"][..., split], sums["steps"][..., split]),
        )
    yield "three_axis", *_divide(sums["three_axis"], sums["answered"])
    found, wanted, said = np.moveaxis(sums["gripper_events"], -1, 0)
    yield "gripper_events.recall", *_divide(found, wanted)
    yield "gripper_events.precision", *_divide(found, said)
    yield from _measure_axes(sums["confusion"])
    if "actions" in sums:
        for column, name in enumerate(("mse", "mse_without_gripper", "cosine", "cosine_without_gripper")):
            yield f"actions.{name}", *_divide(sums["actions"][..., column], sums["action_episodes"])
    if "bins" in sums:
        yield from _measure_calibration(sums["bins"], sums["brier"])


def _measure_axes(confusion: np.ndarray):
    """confusion (..., 6, 3, 3) by axis, label, answer."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)  # (..., 6, 3)
    labels, answers = confusion.sum(axis=-1), confusion.sum(axis=-2)
    moving = labels[..., 0] + labels[..., 2]  # (..., 6)
    opposite = confusion[..., 0, 2] + confusion[..., 2, 0]
    with np.errstate(invalid="ignore"):
        f1 = 2 * right / (labels + answers)  # NaN for a sign that neither has: it is left out of the mean
    present = np.isfinite(f1)
    macro_f1, _ = _divide(np.where(present, f1, 0).sum(axis=-1), present.sum(axis=-1))
    accuracy, steps = _divide(right.sum(axis=-1), labels.sum(axis=-1))
    opposite_rate, _ = _divide(opposite, moving)
    for column, axis in enumerate(AXES):
        yield f"axes.{axis}.accuracy", accuracy[..., column], steps[..., column]
        yield f"axes.{axis}.macro_f1", macro_f1[..., column], moving[..., column]
        yield f"axes.{axis}.opposite", opposite_rate[..., column], moving[..., column]
    yield "axis_accuracy", *_divide(right.sum(axis=(-1, -2)), labels.sum(axis=(-1, -2)))
    yield "opposite", *_divide(opposite.sum(axis=-1), moving.sum(axis=-1))


def _measure_calibration(bins: np.ndarray, brier: np.ndarray):
    """bins (..., 7, NUM_BINS, 3) as `tally_calibration`; brier (..., 7)."""
    gaps, counts = find_calibration_gap(bins)  # (..., 7)
    for kind, name in enumerate(("phrase", *AXES)):
        yield f"calibration.{name}.ece", *_divide(gaps[..., kind], counts[..., kind])
        yield f"calibration.{name}.brier", *_divide(brier[..., kind], counts[..., kind])


def _divide(part: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(part / whole, whole); NaN where whole is 0."""
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0), whole
