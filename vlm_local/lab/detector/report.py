"""The scores of a success detector -> report.json and one self-contained report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.files import open_replacing, write_json
from vlm_local.lab.offline.plots import draw_reliability
from vlm_local.lab.offline.report import encode_thumbnail, open_template


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture and its row."""

    image: np.ndarray
    row: Mapping[str, Any]

    def rank(self) -> float:
        """Smaller is worth a look more: minus the sureness where wrong, the sureness above 1 where right."""
        told = self.row["probabilities"]
        sureness = 0.0 if told is None or self.row["answer"] is None else told[self.row["answer"]]
        return 1 + sureness if self.row["answer"] == self.row["label"] else -sureness


def write_report(folder: Path, report: Mapping[str, Any], shown: Sequence[Shown]) -> None:
    write_json(folder / "report.json", report)
    calibration = report["calibration"]
    template = open_template("report.html", Path(__file__).parent)
    html = template.render(
        report=report,
        reliability=None if calibration is None else draw_reliability(calibration["bins"]),
        pictures=[{"image": encode_thumbnail(each.image), **each.row} for each in shown],
    )
    with open_replacing(folder / "report.html") as file:
        file.write(html)
