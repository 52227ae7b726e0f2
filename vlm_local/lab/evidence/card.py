"""Verified results of `sim` -> the model card of the checkpoint that played."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.checkpoint import open_checkpoint
from vlm_local.environments import OURS
from vlm_local.errors import DataError
from vlm_local.files import open_replacing, write_json
from vlm_local.lab.evidence.choices import list_choices, list_runs_choices
from vlm_local.lab.evidence.markdown import check_name, escape_cell
from vlm_local.lab.evidence.verify import VerifiedResult
from vlm_local.lab.formats import format_share, format_span
from vlm_local.sim.tasks import AUTOEVAL_STEPS

BEGIN, END = "<!-- results -->", "<!-- /results -->"


def write_card(folder: Path, results: Sequence[VerifiedResult]) -> int:
    """Write what was reached into `folder`/vlm_local.json and, between its marks BEGIN and END, README.md.

    A folder without README.md gets one. Returns the number of (setting, task) pairs. Raises DataError for results that
    are not of these weights or of our simulator, for two of one setting, for a name that is none, and for a card
    without marks; ConfigError where nothing can be written.
    """
    checkpoint = open_checkpoint(folder)
    weights = checkpoint.sha256
    settings: dict[str, dict[str, Any]] = {}
    for result in results:
        if result.kind != "sim" or result.report.get("checkpoint_sha256") != weights:
            raise DataError(f"the result {result.seal[:12]} is no simulation of the weights in {folder}")
        env = result.report["simulator"].get("env", OURS)
        if env != OURS:
            raise DataError(
                f"the result {result.seal[:12]} was played in {env}; a card tells success in our simulator, within "
                f"{AUTOEVAL_STEPS} steps"
            )
        tasks = settings.setdefault(_name_setting(result.report, checkpoint.sidecar), {})
        for task, told in _list_tasks(result.report).items():
            if task in tasks:
                raise DataError(f"the result {result.seal[:12]} has {task} once more in the same setting")
            tasks[task] = told
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.exists() else f"# {folder.resolve().name}\n\n{BEGIN}\n{END}\n"
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise DataError(f"{card} does not say where the results go: it needs the lines {BEGIN} and {END}")
    about = json.loads((folder / "vlm_local.json").read_text(encoding="utf-8"))
    write_json(folder / "vlm_local.json", about | {"results": settings | {"checkpoint_sha256": weights}})
    with open_replacing(card) as file:
        file.write(f"{before}{BEGIN}\n{_build_table(settings)}{END}{after}")
    return sum(map(len, settings.values()))


def _name_setting(report: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """What sets a column apart from the weights as they are shipped. own: the checkpoint's sidecar."""
    plan = report["simulator"]
    few = [f"{plan['max_steps']} steps"] * (plan["max_steps"] < AUTOEVAL_STEPS)
    names = [f"level {plan['level']}", *list_runs_choices(plan), *list_choices(report, own), *few]
    return ", ".join(map(check_name, names))


def _list_tasks(report: Mapping[str, Any]) -> dict[str, Any]:
    plan, found = report["simulator"], {}
    for task, scores in report["tasks"].items():
        success = scores["success_70"]
        found[task] = {"success": success["rate"], "interval": success["interval"], "episodes": success["n"]}
        found[task] |= {"seed": plan["seed"], "max_steps": min(AUTOEVAL_STEPS, plan["max_steps"])}
    return found


def _build_table(settings: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a task and a column a setting, both in order of first appearance."""
    tasks = dict.fromkeys(task for played in settings.values() for task in played)
    head = [f"within {AUTOEVAL_STEPS} steps", *map(escape_cell, settings)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for task in tasks:
        cells = [_write_cell(played.get(task)) for played in settings.values()]
        lines.append(f"| {task.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _write_cell(told: Mapping[str, Any] | None) -> str:
    if told is None:
        return "-"
    return (
        f"{format_share(told['success'])} ({format_span(told['interval'], 1)}), {told['episodes']} from {told['seed']}"
    )
