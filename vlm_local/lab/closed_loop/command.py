"""What the command `sim` does: plan, play, score, report."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from vlm_local.assembly import PolicyOptions
from vlm_local.files import encode_json, lock_folder
from vlm_local.lab.closed_loop.report import write_report
from vlm_local.lab.closed_loop.run import Plan, open_run, play, read_outcome
from vlm_local.lab.closed_loop.scores import score_run
from vlm_local.lab.sources import open_cast
from vlm_local.models import DEFAULT
from vlm_local.plain import hide_secrets
from vlm_local.progress import open_bar
from vlm_local.provenance import describe_machine
from vlm_local.sim.tasks import TASKS, find_task

_MOST_WORKERS = 8


def run_sim(args: argparse.Namespace, options: PolicyOptions) -> int:
    """Play, write report.json, report.html and films; print where, and one JSON object as the last line."""
    plan = _build_plan(args, hide_secrets(options.model or DEFAULT))
    folder = Path(args.out or f"results/sim-{_shorten(plan.policy)}-{args.task}-{plan.level}-{plan.seed}")
    cast = open_cast(options, plan.noise)
    lock = _lock(folder)
    try:
        left = open_run(folder, plan, {**cast.metadata, **describe_machine()})
        lock = lock or _lock(folder)
        if not left:
            print(f"all episodes are in {folder} already; another --seed or --out plays others")
        workers = min(args.workers or min(os.cpu_count() or 1, _MOST_WORKERS), cast.most_workers)
        with open_bar(plan.policy, len(left), "episode") as bar:
            play(folder, plan, cast, left, workers, lambda ended: _show(bar, ended))
    finally:
        cast.close()
        if lock is not None:
            lock.close()
    places = [folder / "episodes" / f"{task}-{number}" for task in plan.tasks for number in range(plan.episodes)]
    summary = _finish(folder, plan, places)
    films = [place / "film.mp4" for place in places if (place / "film.mp4").exists()]
    if not args.quiet:
        print(_format_table(summary))
        print(f"report: {folder / 'report.html'}\n{len(films)} films, the first: {films[0] if films else None}")
    print(encode_json(summary))
    return 0


def _lock(folder: Path) -> TextIO | None:
    """A run that is there belongs to one process: a second would delete the episodes that it is playing.

    Raises ConfigError where another has it.
    """
    return lock_folder(folder) if (folder / "meta.json").exists() else None


def _build_plan(args: argparse.Namespace, policy: str) -> Plan:
    tasks = tuple(TASKS) if args.task == "all" else tuple(dict.fromkeys(args.task.split(",")))
    names = ("level", "episodes", "seed", "max_steps", "noise", "control", "films", "gif")
    return Plan(policy, tasks, **{name: getattr(args, name) for name in names})


def _shorten(policy: str) -> str:
    """A file name for a policy: the last part of a path, a URL's host and port."""
    parts = urlsplit(policy)
    name = parts.netloc if "//" in policy and parts.netloc else policy.rstrip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")


def _show(bar, ended: dict[str, Any]) -> None:
    bar.update()
    bar.set_postfix_str(f"{ended['task']}-{ended['number']} {ended['outcome']}")


def _finish(folder: Path, plan: Plan, places: list[Path]) -> dict[str, Any]:
    episodes = [outcome for outcome in map(read_outcome, places) if outcome]
    scores = score_run(episodes, {task: find_task(task).stages for task in plan.tasks})
    write_report(folder, scores, episodes)
    return {name: value for name, value in scores.items() if name != "tasks"} | {
        "policy": plan.policy,
        "level": plan.level,
        "seed": plan.seed,
        "max_steps": plan.max_steps,
        "interval": {task: score["success"]["interval"] for task, score in scores["tasks"].items()},
        "efficiency": {task: score["efficiency"] for task, score in scores["tasks"].items()},
        "out": str(folder),
    }


def _format_table(summary: Mapping[str, Any]) -> str:
    """A line a task."""
    lines = [f"{'':20}{'success':>9}  {'95 %':>14}{'within 70':>11}{'step ratio':>12}"]
    for task, rate in summary["success_rate"].items():
        within, ratio = summary["success_rate_70"][task], summary["efficiency"][task]
        low, high = summary["interval"][task]
        cells = ["-" if share is None else f"{share:.1%}" for share in (rate, within)]
        shown = "-" if ratio is None else f"{ratio:.2f}"
        lines.append(f"{task:20}{cells[0]:>9}  {f'{low:.1%} to {high:.1%}':>14}{cells[1]:>11}{shown:>12}")
    if summary["faulted"]:
        lines.append(
            f"{summary['faulted']} of {summary['episodes']} episodes faulted; the same command plays them again"
        )
    return "\n".join(lines)
