"""Verified results -> a Markdown page of tables that say enough of each row to check it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.errors import DataError
from vlm_local.evidence.verify import Verdict
from vlm_local.files import open_replacing
from vlm_local.sim.report import format_interval, format_share
from vlm_local.spatial import report as spatial_report

_HEAD = """# Leaderboard

Made by `python -m vlm_local leaderboard RESULT... --out docs/leaderboard.md`; do not edit. Every row was
verified first: scored again from its archive without weights, every number came out the same.
`weights` and `seal` are the first digits of the sha256 of the checkpoint and of the archive's files.
[contributing-results.md](contributing-results.md) says how to add rows.
"""
_SIM_HEAD = """
## Closed loop, in the simulator

Success within 120 steps (or the limit named) and within AutoEval's 70, with Wilson's 95 % intervals. A
seed fixes an episode's scene and every draw of the policy in it, so
`python -m vlm_local sim --policy P --task T --level L --seed FIRST --episodes N` plays a row's episodes
again, as verifying did from their recorded actions. The oracle sees the ground truth (the ceiling); random
phrases and standing still are the floor.
"""
_SPATIAL_HEAD = """
## Does it look where the words point?

`python -m vlm_local spatial --policy P --set docs/spatial/LEVEL.json` ([what is measured](spatial/README.md)):
**turned** is 1 where every answer turned with its scene, 0 where none did; **moved** how much of the probability moved
where nothing should (0 is right); **left** how sure an answer stayed where there was nothing left to be sure of (0
is right); **right** how much surer the right direction is than its opposite. 95 % intervals, by bootstrap over scenes.
"""
_SIM_NAMES = ("policy", "weights", "seeds", "success", "within 70", "steps (oracle)", "faulted", "code", "seal")
_MEASURES = ("turned", "moved", "left", "right")
_SPATIAL_NAMES = ("policy", "weights", *_MEASURES, "code", "seal")


def write_leaderboard(verdicts: Sequence[Verdict], out: Path) -> int:
    """Write the page; returns its number of rows. Raises DataError for a kind of result it has no table for."""
    for verdict in verdicts:
        if verdict.kind not in ("sim", "spatial"):
            raise DataError(f"the leaderboard is of `sim` and `spatial`, not of `{verdict.kind}`")
    played = [row for verdict in verdicts if verdict.kind == "sim" for row in _list_tasks(verdict)]
    seen = [_describe_study(verdict) for verdict in verdicts if verdict.kind == "spatial"]
    text = _HEAD
    for head, names, rows in ((_SIM_HEAD, _SIM_NAMES, played), (_SPATIAL_HEAD, _SPATIAL_NAMES, seen)):
        if rows:
            text += head + _build_tables(names, rows)
    with open_replacing(out) as file:
        file.write(text)
    return len(played) + len(seen)


_Row = tuple[str, float, tuple[str, ...]]  # title of its table, what the table is sorted by, cells


def _build_tables(names: Sequence[str], rows: Iterable[_Row]) -> str:
    """A table a title, in order of first appearance; the best row first."""
    tables: dict[str, list[_Row]] = {}
    for row in rows:
        tables.setdefault(row[0], []).append(row)
    text = ""
    for title, lines in tables.items():
        text += f"\n### {title}\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|\n"
        text += "".join(f"| {' | '.join(cells)} |\n" for *_, cells in sorted(lines, key=lambda row: -row[1]))
    return text


def _list_tasks(verdict: Verdict) -> Iterable[_Row]:
    report = verdict.report
    plan = report["simulator"]
    name = plan["policy"] + (f", {plan['noise']:.0%} random" if plan["noise"] else "")
    name += "" if plan["control"] == "none" else f", {plan['control']}"
    limit = "" if plan["max_steps"] == 120 else f" at {plan['max_steps']}"
    for task, score in report["tasks"].items():
        cells = (
            name,
            _shorten(report.get("checkpoint_sha256")),
            f"{plan['seed']} to {plan['seed'] + score['episodes'] - 1}",
            _show_share(score["success"]) + limit,
            _show_share(score["success_70"]),
            "-" if score["steps"] is None else f"{score['steps']:.1f} ({score['oracle_steps'] or 0:.1f})",
            str(score["faulted"]),
            _shorten(report.get("git")),
            _shorten(verdict.seal),
        )
        rate = score["success"]["rate"]
        yield f"{task}, level {plan['level']}", -1.0 if rate is None else rate, cells


def _describe_study(verdict: Verdict) -> _Row:
    report, scenes = verdict.report, verdict.report["set"]
    cells = (
        report["policy"]["name"],
        _shorten(report["policy"].get("checkpoint_sha256")),
        *(_show_value(report[measure]) for measure in _MEASURES),
        _shorten(report.get("git")),
        _shorten(verdict.seal),
    )
    title = f"{report['scenes']} scenes of level {scenes['level']}, seed {scenes['seed']}"
    return title + ("" if report["frozen"] else ", not a frozen set"), report["turned"]["value"], cells


def _shorten(digits: str | None) -> str:
    return f"`{digits[:12]}`" if digits else "-"


def _show_share(rate: Mapping[str, Any]) -> str:
    return f"{format_share(rate['rate'])} ({format_interval(rate['interval'])})"


def _show_value(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "-"
    return f"{spatial_report.format_value(score['value'])} ({spatial_report.format_interval(score['interval'])})"
