"""Scores and rows of a study -> report.json and one self-contained report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.files import open_replacing, write_json
from vlm_local.lab.offline.report import encode_thumbnail, open_template
from vlm_local.lab.spatial.changes import CHANGES, EMPTIES, KEEPS, NONE, TURNS
from vlm_local.lab.spatial.scores import MEASURES, measure_change
from vlm_local.lab.spatial.sets import Gallery
from vlm_local.types import AXES

_PAIRS = 24
_MOST_OF_A_CHANGE = 3  # so that one bad change does not hide the others
_RULES = {
    TURNS: ("The answer must turn", "1 where all mass turns with the scene, 0 where nothing does, -1 the wrong way"),
    KEEPS: ("The answer must keep", "Share of the mass that moved though nothing should: 0 is right, 1 is all of it"),
    EMPTIES: (
        "The answer must lose its confidence",
        "Confidence in a direction that is left: 0 is right, 1 is certain",
    ),
}


def write_report(folder: Path, report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], gallery: Gallery) -> None:
    """report: `score_study` plus `policy`, `set` and how it was made. gallery: draws what is shown."""
    write_json(folder / "report.json", report)
    pairs = [_describe_pair(gallery, rows, *chosen) for chosen in choose_pairs(rows)]
    html = open_template("report.html", Path(__file__).parent).render(
        plain=format_value,
        interval=format_interval,
        report=report,
        rules=_RULES,
        axes=AXES,
        titles={name: change.title for name, change in CHANGES.items()},
        pairs=pairs,
        is_sure=_is_sure(rows),
    )
    with open_replacing(folder / "report.html") as file:
        file.write(html)


def format_value(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no "-0.00"


def format_interval(interval: Sequence[float]) -> str:
    return " to ".join(map(format_value, interval))


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


def _describe_pair(gallery: Gallery, rows, scene: int, change: str, bad: float) -> dict[str, Any]:
    sides = []
    for name in (NONE.name, change):
        row = next(row for row in rows if row["scene"] == scene and row["change"] == name)
        image = encode_thumbnail(gallery.show(scene, name).observation.image)
        bars = [(axis, row["marginals"][axis], None if row["signs"] is None else row["signs"][column])
                for column, axis in enumerate(AXES)]  # fmt: skip
        sides.append({"image": image, "bars": bars, **{key: row[key] for key in ("instruction", "phrase", "right")}})
    rule = CHANGES[change].rule
    return {"scene": scene, "title": CHANGES[change].title, "rule": rule, "measure": MEASURES[rule], "bad": bad,
            "sides": sides}  # fmt: skip


def _is_sure(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all mass is on the phrase that was said, as where a policy tells no probabilities."""
    return all(max(values) == 1 for row in rows for values in row["marginals"].values())
