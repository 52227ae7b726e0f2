"""Reports of `sim` -> a Markdown table that says enough of each row to check it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.files import open_replacing
from vlm_local.sim.report import format_interval, format_share

_HEAD = """# Leaderboard of the simulator

Made by `python -m vlm_local leaderboard RESULT... --out docs/leaderboard.md`; do not edit. Every row was
verified first: its episodes were played again from their seeds and recorded actions, and every number
came out the same. [contributing-results.md](contributing-results.md) says how to add rows.

Success within 120 steps (or the limit named) and within AutoEval's 70, with Wilson's 95 % intervals. A
seed fixes an episode's scene and every draw of the policy in it, so
`python -m vlm_local sim --policy P --task T --level L --seed FIRST --episodes N` plays a row's episodes
again. `seal` is of the row's archive. The oracle sees the ground truth (the ceiling), random phrases are
the floor.
"""
_NAMES = ("policy", "weights", "seeds", "success", "within 70", "steps (oracle)", "faulted", "code", "seal")
_COLUMNS = f"| {' | '.join(_NAMES)} |\n{'|---' * len(_NAMES)}|\n"


def write_leaderboard(results: Sequence[tuple[Mapping[str, Any], str]], out: Path) -> int:
    """Write the page; returns its number of rows. results: report and seal of runs that were verified."""
    rows: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for report, seal in results:
        plan = report["simulator"]
        for task, score in report["tasks"].items():
            rate = score["success"]["rate"]
            row = _build_row(report, score, seal)
            rows.setdefault((task, plan["level"]), []).append((-1.0 if rate is None else rate, row))
    text = _HEAD
    for (task, level), lines in rows.items():
        text += f"\n## {task}, level {level}\n\n{_COLUMNS}"
        text += "".join(line for _, line in sorted(lines, key=lambda pair: -pair[0]))
    with open_replacing(out) as file:
        file.write(text)
    return sum(map(len, rows.values()))


def _build_row(report: Mapping[str, Any], score: Mapping[str, Any], seal: str) -> str:
    plan = report["simulator"]
    name = plan["policy"] + (f", {plan['noise']:.0%} random" if plan["noise"] else "")
    name += "" if plan["control"] == "none" else f", {plan['control']}"
    weights = report.get("checkpoint_sha256")
    cells = (
        name,
        f"`{weights[:12]}`" if weights else "-",
        f"{plan['seed']} to {plan['seed'] + score['episodes'] - 1}",
        _show(score["success"]) + ("" if plan["max_steps"] == 120 else f" at {plan['max_steps']}"),
        _show(score["success_70"]),
        "-" if score["steps"] is None else f"{score['steps']:.1f} ({score['oracle_steps'] or 0:.1f})",
        str(score["faulted"]),
        f"`{(report.get('git') or '?')[:12]}`",
        f"`{seal[:12]}`",
    )
    return f"| {' | '.join(cells)} |\n"


def _show(rate: Mapping[str, Any]) -> str:
    return f"{format_share(rate['rate'])} ({format_interval(rate['interval'])})"
