"""A tuning's report: report.json, report.md and one self-contained report.html, all of the same table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.files import open_replacing
from vlm_local.lab import pages
from vlm_local.lab.formats import format_edges, format_name, format_p, format_points, format_share, format_span
from vlm_local.lab.tune.rungs import describe_setting
from vlm_local.lab.tune.scores import MAX_P

_HEAD = ("rung", "setting", "log-loss", "difference", "95 %", "p (Holm)", "accuracy", "time of a step", "note")
_HELD_OUT_HEAD = ("held-out episodes", "log-loss", "95 %", "accuracy", "95 %")


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write `folder`/report.json, report.md and report.html. Raises ConfigError where nothing can be written."""
    with open_replacing(folder / "report.md") as file:
        file.write(format_report(report))
    pages.write_report(
        folder,
        "tune/report.html",
        report,
        made=("plan", "policy", "split"),
        cards=_list_cards(report),
        warnings=pages.list_warnings(report["policy"], report["left_out"]),
        chosen=describe_setting(report["chosen"]),
        head=_HEAD,
        lines=list_lines(report),
        held_out_head=_HELD_OUT_HEAD,
        held_out=list_held_out(report),
        verdict=describe_verdict(report),
    )


def list_lines(report: Mapping[str, Any]) -> list[Sequence[str]]:
    """The table "what each rung brings and costs": a line for the base and for each variant, cells as in _HEAD."""
    base = report["base"]
    costs = [entry["cost"] for rung in report["rungs"] for entry in rung["variants"] if entry.get("cost")]
    base_ms = f"{np.median([cost['base_ms'] for cost in costs]):.0f} ms" if costs else "-"
    lines: list[Sequence[str]] = [
        ("base", "", _format_loss(base["log_loss"]), "", "", "", format_share(base["accuracy"]), base_ms, "")
    ]
    for rung in report["rungs"]:
        if rung["skipped"] is not None:
            lines.append((rung["name"], rung["about"], *[""] * 6, f"skipped: {rung['skipped']}"))
        else:
            lines += [_list_cells(rung["name"], entry) for entry in rung["variants"]]
    return lines


def _list_cells(rung: str, entry: Mapping[str, Any]) -> Sequence[str]:
    setting = describe_setting(entry["setting"])
    if "refused" in entry:
        return rung, setting, *[""] * 6, f"skipped: {entry['refused']}"
    scores, difference, cost = entry["development"], entry["difference"], entry["cost"]
    return (
        rung,
        setting,
        _format_loss(scores["log_loss"]),
        _format_difference(difference["log_loss"]),
        _format_loss_span(difference["log_loss_interval"]),
        format_p(difference["p_holm"]),
        format_share(scores["accuracy"]),
        f"{cost['ratio']:.2f} x" if cost else "-",
        "kept" if entry["kept"] else "",
    )


def list_held_out(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Lines of base, choice and their difference on the episodes that took no part, cells as in _HELD_OUT_HEAD."""
    held_out = report["held_out"]
    lines = [_list_scores("base", held_out["base"])]
    if held_out["chosen"] is not None:
        lines.append(_list_scores(describe_setting(report["chosen"]), held_out["chosen"]))
        difference = held_out["difference"]
        lines.append(
            (
                "difference",
                _format_difference(difference["log_loss"]),
                _format_loss_span(difference["log_loss_interval"]),
                f"{format_points(difference['accuracy'], 1, '+')} points",
                format_span(difference["accuracy_interval"], 1, "+"),
            )
        )
    return lines


def _list_scores(name: str, scores: Mapping[str, Any]) -> tuple[str, ...]:
    loss, accuracy = _format_loss(scores["log_loss"]), format_share(scores["accuracy"])
    spans = _format_loss_span(scores["log_loss_interval"], ""), format_span(scores["accuracy_interval"], 1)
    return name, loss, spans[0], accuracy, spans[1]


def describe_verdict(report: Mapping[str, Any]) -> str:
    """What came of it, in a sentence or two."""
    difference = report["held_out"]["difference"]
    if difference is None:
        return "No rung brings more than chance on the episodes for development, so the base stays as it is."
    chosen = describe_setting(report["chosen"])
    place, p_value = "On episodes that took no part,", f"(p {format_p(difference['p_value'])})"
    if difference["p_value"] >= MAX_P:  # an interval alone would claim too much of few episodes
        return (
            f"{place} {chosen} cannot be told from the base {p_value}: its gain in development may be chance, or "
            "these episodes are too few."
        )
    if difference["log_loss"] < 0:
        return f"{place} {chosen} has less log-loss than the base {p_value}."
    return f"{place} {chosen} has more log-loss than the base {p_value}: do not use it."


def format_report(report: Mapping[str, Any]) -> str:
    """Both tables in Markdown, padded so that they can be read in a terminal."""
    split = report["split"]
    steps, held_out = report["base"]["steps"], report["held_out"]["base"]["steps"]
    lines = [
        f"# Tuning of {format_name(report['policy']['name'])} on {report['data']['name']}",
        "",
        f"{steps} steps of {len(split['development'])} episodes to choose by; {held_out} steps of "
        f"{len(split['held_out'])} episodes that took no part.",
        "",
        *_format_table(_HEAD, list_lines(report)),
        "",
        *_format_table(_HELD_OUT_HEAD, list_held_out(report)),
        "",
        describe_verdict(report),
        "",
        "log-loss: -ln of the probability of the label's direction, mean over steps; less is better.",
        "difference: to the rungs kept before. 95 %: bootstrap over episodes.",
        "p: one-sided permutation test over episodes, Holm's over the variants of a rung; kept below 0.05.",
        "time of a step: median, as a ratio to the base's, asked of both in turns.",
        "",
    ]
    return "\n".join(lines)


def _format_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """The last column is not padded: it may hold a sentence."""
    widths = [max(len(line[column]) for line in (head, *lines)) for column in range(len(head) - 1)]
    rows = [head, ["-" * width for width in widths] + ["---"], *lines]
    cells = [[*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]] for row in rows]
    return [f"| {' | '.join(row)} |" for row in cells]


def _list_cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    held_out = report["held_out"]
    cards = [(_format_loss(held_out["base"]["log_loss"]), "log-loss of the base, held-out episodes")]
    if held_out["chosen"] is not None:
        span = _format_loss_span(held_out["difference"]["log_loss_interval"])
        cards += [
            (_format_loss(held_out["chosen"]["log_loss"]), "log-loss of the choice"),
            (_format_difference(held_out["difference"]["log_loss"]), f"difference{', ' * bool(span)}{span}"),
        ]
        cards += [(f"{held_out['cost']['ratio']:.2f} x", "time of a step, to the base's")] * bool(held_out["cost"])
    return cards


def _format_loss(value: float) -> str:
    return f"{value:.3f}"


def _format_difference(value: float) -> str:
    return f"{value + 0.0:+.3f}"


def _format_loss_span(interval: Sequence[float] | None, sign: str = "+") -> str:
    return format_edges(interval, lambda edge: f"{edge + 0.0:{sign}.3f}")
