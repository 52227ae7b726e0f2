"""Scores and outcomes of a run -> report.json and one self-contained report.html."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vlm_local.data.film import read_picture
from vlm_local.environments import OURS, find_suite, name_robot
from vlm_local.errors import DataError
from vlm_local.files import write_json
from vlm_local.lab import pages
from vlm_local.lab.formats import format_share
from vlm_local.sim.tasks import AUTOEVAL_STEPS


def write_report(folder: Path, scores: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]) -> None:
    """Write `folder`/report.json and report.html.

    scores: `score_run`. episodes: as given to `score_run`. What the run was made with is in `folder`/meta.json. Raises
    ConfigError where nothing can be written.
    """
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    report = {**meta, **scores}
    write_json(folder / "report.json", report)
    tasks = scores["tasks"]
    ordered = sorted(episodes, key=lambda episode: (list(tasks).index(episode["task"]), episode["number"]))
    faulted = f"{report['faulted']} of {report['episodes']} episodes got no answer from the policy and are in no rate."
    pages.write_page(
        folder / "report.html",
        "closed_loop/report.html",
        report,
        made=[name for name in meta if name != "simulator"],
        warnings=[faulted] * bool(report["faulted"]) + pages.list_warnings(meta),
        plan=report["simulator"],
        limit=AUTOEVAL_STEPS,
        suite=find_suite(report["simulator"].get("env", OURS)),
        bars=_draw_rates(tasks),
        stages={task: _draw_stages(score) for task, score in tasks.items()},
        episodes=[{**episode, **_find_pictures(folder, episode)} for episode in ordered],
    )


def _find_pictures(folder: Path, episode: Mapping[str, Any]) -> dict[str, Any]:
    """film: relative path, or None. last: base64 JPEG of what came of it, or None."""
    place = folder / "episodes" / f"{name_robot(episode['task'])}-{episode['number']}"
    frames = sorted((place / "frames").glob("*.png"))
    film = place / "film.mp4"
    return {
        "film": film.relative_to(folder).as_posix() if film.exists() else None,
        "last": pages.encode_thumbnail(_load_end(film, frames[-1], episode["steps"])) if frames else None,
    }


def _load_end(film: Path, last: Path, num_steps: int) -> np.ndarray:
    """The scene after the last step, which only the film has; of a run without films the last that the policy saw."""
    try:
        return read_picture(film, num_steps)
    except DataError:
        return np.asarray(Image.open(last))


@pages.styled
def _draw_rates(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar a task with its interval; ticks for the oracle and for random phrases."""
    figure = Figure(figsize=(7, 0.9 + 0.45 * len(tasks)), layout="constrained")
    plot = figure.subplots()
    for row, score in enumerate(tasks.values()):
        success = score["success"]
        plot.barh(row, success["rate"] or 0, height=0.6, color=pages.BLUE)
        plot.plot(success["interval"], [row, row], color=pages.BLACK, linewidth=1.2)
        for name, colour in (("oracle", pages.GREEN), ("random", pages.RED)):
            if score[name]["rate"] is not None:
                label = name if row == 0 else None
                plot.plot([score[name]["rate"]] * 2, [row - 0.38, row + 0.38], color=colour, label=label)
        text = f"{format_share(success['rate'])}  ({success['count']} of {success['n']})"
        plot.text(1.03, row, text, va="center")
    plot.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
    plot.invert_yaxis()
    plot.set(xlim=(0, 1.32))
    plot.set_xticks(*pages.QUARTERS)
    plot.tick_params(axis="y", length=0)
    if plot.get_legend_handles_labels()[0]:
        figure.legend(frameon=False, loc="outside lower right", ncols=2)
    return pages.render_svg(figure)


@pages.styled
def _draw_stages(score: Mapping[str, Any]) -> str:
    """How many episodes reached each stage of the task."""
    names, counts = list(score["reached"]), list(score["reached"].values())
    figure = Figure(figsize=(3.4, 0.5 + 0.3 * len(names)), layout="constrained")
    plot = figure.subplots()
    plot.barh(range(len(names)), counts, color=pages.LIGHT_BLUE)
    for row, count in enumerate(counts):
        plot.text(count, row, f" {count}", va="center")
    plot.set_yticks(range(len(names)), names)
    plot.set(xlim=(0, 1.15 * max(score["success"]["n"], 1)), xticks=[])
    plot.spines["bottom"].set_visible(False)
    plot.tick_params(axis="y", length=0)
    plot.invert_yaxis()
    return pages.render_svg(figure)
