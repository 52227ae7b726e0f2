"""The scores of a benchmark of multiple-choice questions -> report.json and one self-contained report.html."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.lab import pages
from vlm_local.lab.asked import Shown
from vlm_local.lab.formats import format_p, format_points, format_share, format_span


def write_report(folder: Path, report: Mapping[str, Any], shown: Sequence[Shown]) -> None:
    """Write `folder`/report.json and report.html.

    report: `score_rows` with `policy`, `data` and how it was made. shown: last pictures and rows of the questions on
    the page. Raises ConfigError where nothing can be written.
    """
    calibration = report["calibration"]
    failed = f"{report['failed']} questions got no answer; they count as wrong."
    pages.write_report(
        folder,
        "multiple_choice/report.html",
        report,
        made=("policy", "data_sha256"),
        cards=_list_cards(report),
        warnings=[failed] * bool(report["failed"]) + pages.list_warnings(report["policy"], report["left_out"]),
        reliability=None if calibration is None else pages.draw_reliability(calibration["bins"]),
        choices=sorted({*report["said"], *report["right"]}),
        pictures=[{"image": pages.encode_thumbnail(image), **row} for image, row in shown],
    )


def _list_cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    seeing, blind, difference = (report["measures"][0][name] for name in ("seeing", "blind", "difference"))
    interval = seeing["interval"]
    cards = [
        (format_share(seeing["value"]), "right answers" + (f", {format_span(interval)} %" if interval else "")),
        (format_share(blind["value"]), "with grey pictures"),
        (format_points(difference["value"], 1, "+"), f"points by seeing, p {format_p(difference['p_value'])}"),
        (format_share(report["chance"]), "by guessing"),
    ]
    if report["calibration"]:
        cards.append((f"{report['calibration']['ece']:.3f}", "calibration error"))
    return cards
