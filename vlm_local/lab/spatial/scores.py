"""Rows of a study -> how far answers turned, kept and lost confidence, with intervals over scenes.

With m = p(+) - p(-) of an axis, s the right sign before and -s after a change:

- turned: (s m_before - s m_after) / 2. 1 where all mass went from right to right, 0 where nothing
  moved (or what moved was no direction), -1 where it moved the wrong way.
- moved: total variation distance between an axis' probabilities before and after, where the right sign
  is the same. 0 where nothing moved.
- left: |m_after|, the confidence in a direction that is left where there is no right one. 0 for "stop"
  and for all directions alike.
- right: s m_before, how much more mass the right direction has than the opposite, as the scene is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.lab.spatial.scenes import CHANGES, EMPTIES, KEEPS, NONE, TURNS
from vlm_local.lab.statistics import bootstrap_ratio
from vlm_local.types import AXES

MEASURES = {TURNS: "turned", KEEPS: "moved", EMPTIES: "left"}


def score_study(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """rows: as in rows.jsonl, one for every scene and change. seed: of the bootstrap.

    Returns "turned", "moved", "left", "right" over all changes, "changes" by name, each {value,
    interval (95 %), n} with "axes"; value is None where no scene has such an axis.
    """
    before = _collect(rows, NONE.name)
    changes = {}
    for change in CHANGES.values():
        after = _collect(rows, change.name)
        values = measure_change(change.rule, before, after)
        line = {"rule": change.rule, "measure": MEASURES[change.rule], **_summarise(values, seed)}
        if change.rule == TURNS:  # the axes that should have kept
            line["beside"] = _summarise(measure_change(KEEPS, before, after), seed)
        changes[change.name] = line
    values = measure_scenes(rows)
    right = values.pop("right")
    totals = {measure: _summarise(pool, seed, ()) for measure, pool in values.items()}
    return {
        "scenes": len(right),
        **totals,
        "right": _summarise(right, seed),
        "changes": changes,
    }


def measure_scenes(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """ "turned", "moved" and "left" over all changes, float (S, any), and "right" (S, 6); NaN where there is none."""
    before = _collect(rows, NONE.name)
    pools: dict[str, list[np.ndarray]] = {measure: [] for measure in MEASURES.values()}
    for change in CHANGES.values():
        pools[MEASURES[change.rule]].append(measure_change(change.rule, before, _collect(rows, change.name)))
    signs, marginals = before
    right = np.where(signs == 0, np.nan, signs * _lean(marginals))
    return {measure: np.concatenate(pool, axis=1) for measure, pool in pools.items()} | {"right": right}


def measure_change(rule: str, before, after) -> np.ndarray:
    """(S, 6), NaN where an axis has nothing to say. before, after: signs (S, 6), NaN for none, and marginals."""
    (signs, marginals), (new_signs, new_marginals) = before, after
    if rule == EMPTIES:
        return np.abs(_lean(new_marginals))
    if rule == TURNS:
        turned = signs * (_lean(marginals) - _lean(new_marginals)) / 2
        return np.where(signs * new_signs == -1, turned, np.nan)
    moved = np.abs(marginals - new_marginals).sum(axis=2) / 2
    return np.where(signs == new_signs, moved, np.nan)


def _lean(marginals: np.ndarray) -> np.ndarray:
    """(..., 3) for -, 0, + -> p(+) - p(-)."""
    return marginals[..., 2] - marginals[..., 0]


def _collect(rows: Sequence[Mapping[str, Any]], change: str) -> tuple[np.ndarray, np.ndarray]:
    """Signs (S, 6) and marginals (S, 6, 3) of one change, in order of the scenes."""
    chosen = sorted((row for row in rows if row["change"] == change), key=lambda row: row["scene"])
    if [row["scene"] for row in chosen] != list(range(len(chosen))) or not chosen:
        raise ValueError(f"scenes of {change} are missing or there twice")
    return read_rows(chosen)


def read_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Signs float (N, 6), NaN for none, and marginals float (N, 6, 3)."""
    signs = [[np.nan] * len(AXES) if row["signs"] is None else row["signs"] for row in rows]
    marginals = [[row["marginals"][axis] for axis in AXES] for row in rows]
    return np.array(signs, np.float64), np.array(marginals, np.float64)


def _summarise(values: np.ndarray, seed: int, axes: Sequence[str] = AXES) -> dict[str, Any]:
    """values: (S, any), NaN for unknown -> mean over all, and over each of `axes`."""
    line = _average(values, seed)
    if axes:
        line["axes"] = {axis: _average(values[:, [column]], seed) for column, axis in enumerate(axes)}
    return line


def _average(values: np.ndarray, seed: int) -> dict[str, Any]:
    """values: (S, any) -> the mean of all, with its interval over scenes and the number of known values."""
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1).astype(np.float64)
    if not counts.sum():
        return {"value": None, "interval": None, "n": 0}
    return {
        "value": float(sums.sum() / counts.sum()),
        "interval": bootstrap_ratio(sums, counts, seed),
        "n": int(counts.sum()),
    }
