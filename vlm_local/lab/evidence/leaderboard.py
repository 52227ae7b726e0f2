"""Verified results -> a Markdown page of tables that say enough of each row to check it."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.environments import OURS
from vlm_local.errors import DataError
from vlm_local.files import open_replacing
from vlm_local.lab.closed_loop.scores import reaches_autoeval
from vlm_local.lab.evidence.choices import list_choices, list_runs_choices
from vlm_local.lab.evidence.markdown import check_name, escape_cell
from vlm_local.lab.evidence.verify import VerifiedResult
from vlm_local.lab.formats import format_fixed, format_range, format_share, format_span

_HEAD = """# Leaderboard

Made by `.venv/bin/python -m vlm_local leaderboard RESULT... --out docs/leaderboard.md`; do not edit. Every row was
verified first: scored again from its archive without weights, every number came out the same.
`weights` and `seal` are the first digits of the sha256 of the checkpoint and of the archive's files. A policy's name is
followed by its settings that are not `serve`'s defaults, e.g. those of a checkpoint's own `vlm_local.json`.
[contributing-results.md](contributing-results.md) says how to add rows.
"""
_SIM_HEAD = """
## Closed loop, in the simulator

Success within 120 steps (or the limit named) and, where so many were played, within AutoEval's 70, with Wilson's 95 %
intervals. A seed fixes an episode's scene and every draw of the policy in it, so
`.venv/bin/python -m vlm_local sim --policy P --task T --level L --seed FIRST --episodes N` plays a row's episodes
again with the settings that it names, as verifying did from their recorded actions. The oracle sees the ground truth
(the ceiling); random phrases and standing still are the floor.
"""
_SPATIAL_HEAD = """
## Does it look where the words point?

`.venv/bin/python -m vlm_local spatial --policy P --set docs/spatial/LEVEL.json --out DIR`
([what is measured](spatial/README.md)):
**turned** is 1 where every answer turned with its scene, 0 where none did; **moved** how much of the probability moved
where nothing should (0 is right); **left** how sure an answer stayed where there was nothing left to be sure of (0
is right); **right** how much surer the right direction is than its opposite. 95 % intervals, by bootstrap over scenes.
"""
_SIM_NAMES = ("policy", "weights", "seeds", "success", "within 70", "steps (oracle)", "faulted", "code", "seal")
_MEASURES = ("turned", "moved", "left", "right")
_SPATIAL_NAMES = ("policy", "weights", *_MEASURES, "code", "seal")


def write_leaderboard(results: Sequence[VerifiedResult], out: Path) -> int:
    """Write the page; returns its number of rows. Raises DataError for a kind of result it has no table for."""
    for result in results:
        if result.kind not in ("sim", "spatial"):
            raise DataError(f"the leaderboard is of `sim` and `spatial`, not of `{result.kind}`")
    played = [row for result in results if result.kind == "sim" for row in _read(_list_tasks, result)]
    seen = [_read(_describe_study, result) for result in results if result.kind == "spatial"]
    text = _HEAD
    for head, names, rows in ((_SIM_HEAD, _SIM_NAMES, played), (_SPATIAL_HEAD, _SPATIAL_NAMES, seen)):
        if rows:
            text += head + _build_tables(names, rows)
    with open_replacing(out) as file:
        file.write(text)
    return len(played) + len(seen)


_Row = tuple[str, float, tuple[str, ...]]  # title of its table, what the table is sorted by, cells


def _read(describe: Callable[[VerifiedResult], Any], result: VerifiedResult) -> Any:
    """What `describe` makes of a result. Raises DataError for fields that are not of the kind they should be."""
    try:
        return describe(result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"the result {result.seal[:12]} does not say what a row of it needs ({error!r})") from None


def _build_tables(names: Sequence[str], rows: Iterable[_Row]) -> str:
    """A table a title, in order of first appearance; the best row first."""
    tables: dict[str, list[_Row]] = {}
    for row in rows:
        tables.setdefault(row[0], []).append(row)
    text = ""
    for title, lines in tables.items():
        text += f"\n### {title}\n\n| {' | '.join(names)} |\n{'|---' * len(names)}|\n"
        ordered = sorted(lines, key=lambda row: -row[1])
        text += "".join(f"| {' | '.join(map(escape_cell, cells))} |\n" for *_, cells in ordered)
    return text


def _list_tasks(result: VerifiedResult) -> list[_Row]:
    report, rows = result.report, []
    plan = report["simulator"]
    choices = [*list_runs_choices(plan), *list_choices(report)]
    name = ", ".join([check_name(plan["policy"]), *map(check_name, choices)])
    limit = "" if plan["max_steps"] == 120 else f" at {plan['max_steps']}"
    env = "" if plan.get("env", OURS) == OURS else f" of {check_name(plan['env'])}"
    for task, score in report["tasks"].items():
        cells = (
            name,
            _shorten(report.get("checkpoint_sha256")),
            f"{plan['seed']} to {plan['seed'] + score['episodes'] - 1}",
            _show_share(score["success"]) + limit,
            _show_share(score["success_70"]) if reaches_autoeval(plan) else "-",
            "-" if score["steps"] is None else f"{score['steps']:.1f} ({format_fixed(score['oracle_steps'], 1)})",
            str(score["faulted"]),
            _shorten(report.get("git")),
            _shorten(result.seal),
        )
        rate = score["success"]["rate"]
        rows.append((f"{task}{env}, level {check_name(plan['level'])}", -1.0 if rate is None else rate, cells))
    return rows


def _describe_study(result: VerifiedResult) -> _Row:
    report, scenes = result.report, result.report["set"]
    cells = (
        ", ".join([check_name(report["policy"]["name"]), *map(check_name, list_choices(report["policy"]))]),
        _shorten(report["policy"].get("checkpoint_sha256")),
        *(_show_value(report[measure]) for measure in _MEASURES),
        _shorten(report.get("git")),
        _shorten(result.seal),
    )
    title = f"{report['scenes']} scenes of level {scenes['level']}, seed {scenes['seed']}"
    return title + ("" if report["frozen"] else ", not a frozen set"), report["turned"]["value"], cells


def _shorten(digits: str | None) -> str:
    if digits is not None and not re.fullmatch(r"[0-9a-f]{7,64}\+?", digits):
        raise DataError(f"{digits!r:.200} is neither a sha256 nor a commit")
    return f"`{digits[:12]}`" if digits else "-"


def _show_share(rate: Mapping[str, Any]) -> str:
    return f"{format_share(rate['rate'])} ({format_span(rate['interval'], 1)} %)"


def _show_value(score: Mapping[str, Any]) -> str:
    if score["value"] is None:
        return "-"
    interval = format_range(score["interval"])
    return format_fixed(score["value"]) + (f" ({interval})" if interval else "")
