"""Scores and rows of a study -> report.json and one self-contained report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.files import write_json
from vlm_local.lab.formats import format_fixed, format_range
from vlm_local.lab.pages import encode_thumbnail, list_warnings, write_page
from vlm_local.lab.spatial.scenes import CHANGES, EMPTIES, KEEPS, NONE, TURNS
from vlm_local.lab.spatial.scores import measure_change
from vlm_local.lab.spatial.sets import Gallery
from vlm_local.types import AXES

_PAIRS = 24
_MOST_OF_A_CHANGE = 3  # so that one bad change does not hide the others
_RULES = {
    TURNS: (
        "The answer must turn",
        "1 where all probability turns with the scene, 0 where nothing does, -1 the wrong way",
    ),
    KEEPS: (
        "The answer must stay",
        "Share of the probability that moved though nothing should: 0 is right, 1 is all of it",
    ),
    EMPTIES: (
        "The answer must lose its confidence",
        "Confidence in a direction that is left: 0 is right, 1 is certain",
    ),
}
_CARDS = {
    "turned": "turned with the scene{}; 1 is right",
    "moved": "moved for no reason{}; 0 is right",
    "left": "confidence left without reason{}; 0 is right",
    "right": "right less opposite direction, scenes unchanged{}; 1 is right",
}
_CERTAIN = "The policy tells no probabilities: the phrase that it said counts as certain."


def write_report(folder: Path, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], gallery: Gallery) -> None:
    """Write `folder`/report.json and report.html.

    report: `score_study` with `policy`, `set` and how it was made. gallery: draws the pictures that are shown. Raises
    ConfigError where nothing can be written.
    """
    write_json(folder / "report.json", report)
    write_page(
        folder / "report.html",
        "spatial/report.html",
        report,
        made=("policy", "set"),
        cards=[
            (format_fixed(report[name]["value"]), text.format(", " + interval if interval else ""))
            for name, text in _CARDS.items()
            for interval in [format_range(report[name]["interval"])]
        ],
        warnings=list_warnings(report["policy"]) + [_CERTAIN] * _is_certain(rows),
        rules=_RULES,
        axes=AXES,
        titles={name: change.title for name, change in CHANGES.items()},
        pairs=[_describe_pair(gallery, rows, scene, change) for scene, change, _ in choose_pairs(rows)],
    )


def choose_pairs(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, str, float]]:
    """(scene, change, how bad 0..1) of what to show, worst first: at most three of a change."""
    found = {(row["scene"], row["change"]): row for row in rows}
    worst = []
    for name, change in CHANGES.items():
        badness = []
        for scene in range(len(found) // (len(CHANGES) + 1)):
            values = measure_change(change.rule, *(_read(found[scene, which]) for which in (NONE.name, name)))
            known = values[np.isfinite(values)]
            if len(known):
                bad = (1 - known.mean()) / 2 if change.rule == TURNS else known.max()
                badness.append((scene, name, float(bad)))
        worst += sorted(badness, key=lambda pair: -pair[2])[:_MOST_OF_A_CHANGE]
    return sorted(worst, key=lambda pair: -pair[2])[:_PAIRS]


def _read(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Signs (1, 6), NaN for none, and marginals (1, 6, 3)."""
    signs = [np.nan] * len(AXES) if row["signs"] is None else row["signs"]
    return np.array([signs], np.float64), np.array([[row["marginals"][axis] for axis in AXES]])


def _describe_pair(gallery: Gallery, rows: Sequence[Mapping[str, Any]], scene: int, change: str) -> dict[str, Any]:
    sides = []
    for name in (NONE.name, change):
        row = next(row for row in rows if row["scene"] == scene and row["change"] == name)
        image = encode_thumbnail(gallery.show(scene, name).observation.image)
        signs = [None] * len(AXES) if row["signs"] is None else row["signs"]
        bars = [(axis, row["marginals"][axis], sign) for axis, sign in zip(AXES, signs, strict=True)]
        sides.append({"image": image, "bars": bars, **{key: row[key] for key in ("instruction", "phrase", "right")}})
    return {"scene": scene, "title": CHANGES[change].title, "sides": sides}


def _is_certain(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all mass is on the phrase that was said, as where a policy tells no probabilities."""
    return all(max(values) == 1 for row in rows for values in row["marginals"].values())
