"""The scenes of a spatial study, to be compared with those of others of the same set."""

from pathlib import Path

import numpy as np

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines
from vlm_local.lab.comparison import Measure, Trials, describe_making, read_report
from vlm_local.lab.spatial.scores import measure_scenes
from vlm_local.types import AXES

_MEASURES = (
    Measure("turned", is_share=False),
    Measure("moved", is_share=False, lower_is_better=True),
    Measure("left", is_share=False, lower_is_better=True),
    Measure("right", is_share=False),
    *(Measure(f"right, {axis}", group="axis", is_share=False) for axis in AXES),
)


def load_trials(folder: Path) -> Trials:
    """folder: the --out of `spatial`. Scores: its four totals, and "right" of each axis. Raises DataError."""
    report = read_report(folder)
    try:
        rows = list(read_json_lines(folder / "rows.jsonl"))
        values = measure_scenes(rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: rows.jsonl is of no finished spatial study ({error!r})") from None
    num_scenes = len(values["right"])
    right = values.pop("right")
    values |= {"right": right} | {f"right, {axis}": right[:, [column]] for column, axis in enumerate(AXES)}
    shown: list[list] = [[] for _ in range(num_scenes)]
    for row in sorted(rows, key=lambda row: row["change"]):
        shown[row["scene"]].append((row["change"], row["instruction"], row["signs"]))
    return Trials(
        kind="spatial",
        noun="scene",
        truth_noun="scene",
        settings={name: report["set"][name] for name in ("level", "seed")},
        about=describe_making(report, report["policy"]),
        measures=_MEASURES,
        keys=[f"scene {scene}" for scene in range(num_scenes)],
        units=np.arange(num_scenes),
        truths=shown,
        scores={name: _sum_known(table) for name, table in values.items()},
        conditions={"pictures": report["set"].get("images_sha256")},
        counted="axes, of each scene and change that says what is right",
    )


def _sum_known(values: np.ndarray) -> np.ndarray:
    """(S, any), NaN for unknown -> (S, 2): sum of the known values, and their number."""
    known = np.isfinite(values)
    return np.stack([np.where(known, values, 0.0).sum(axis=1), known.sum(axis=1)], axis=1).astype(np.float64)
