"""Scores and outcomes of a run -> report.json and one self-contained report.html."""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from vlm_local.files import open_replacing, write_json
from vlm_local.lab.closed_loop.scores import AUTOEVAL_STEPS
from vlm_local.lab.figures import STYLE, render_svg

_THUMBNAIL_PX = 160
_BLUE, _LIGHT, _GREY = "#2166ac", "#9ec5e6", "#8a8f98"


def write_report(folder: Path, scores: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]) -> None:
    """scores: of score_run, with what the run was made with. episodes: as given to score_run."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    report = {**meta, **scores}
    write_json(folder / "report.json", report)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"share": format_share, "interval": format_interval, "number": _format_number}
    template = environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    ordered = sorted(episodes, key=lambda episode: (list(scores["tasks"]).index(episode["task"]), episode["number"]))
    html = template.render(
        report=report,
        plan=report["simulator"],
        limit=AUTOEVAL_STEPS,
        bars=_draw_rates(scores["tasks"]),
        funnels={task: _draw_stages(score) for task, score in scores["tasks"].items()},
        episodes=[{**episode, **_find_pictures(folder, episode)} for episode in ordered],
        provenance=json.dumps({name: value for name, value in meta.items() if name != "simulator"}, indent=1),
    )
    with open_replacing(folder / "report.html") as file:
        file.write(html)


def format_share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def format_interval(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f} %"


def _format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _find_pictures(folder: Path, episode: Mapping[str, Any]) -> dict[str, Any]:
    """film: relative path, or None. last: base64 JPEG of the last frame, or None."""
    place = folder / "episodes" / f"{episode['task']}-{episode['number']}"
    frames = sorted((place / "frames").glob("*.png"))
    film = place / "film.mp4"
    return {
        "film": film.relative_to(folder).as_posix() if film.exists() else None,
        "last": _encode_thumbnail(frames[-1]) if frames else None,
    }


def _encode_thumbnail(path: Path) -> str:
    picture = Image.open(path)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def _draw_rates(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """A bar a task with its interval; ticks for oracle (ceiling) and random phrases (floor)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.45 * len(tasks)), layout="constrained")
        plot = figure.subplots()
        for row, score in enumerate(tasks.values()):
            success = score["success"]
            plot.barh(row, success["rate"] or 0, height=0.6, color=_BLUE)
            plot.plot(success["interval"], [row, row], color="#222", linewidth=1.2)
            for name, colour in (("oracle", "#1e7d46"), ("random", "#c0392b")):
                if score[name]["rate"] is not None:
                    label = name if row == 0 else None
                    plot.plot([score[name]["rate"]] * 2, [row - 0.38, row + 0.38], color=colour, label=label)
            text = f"{format_share(success['rate'])}  ({success['count']} of {success['n']})"
            plot.text(1.03, row, text, va="center")
        plot.set_yticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
        plot.invert_yaxis()
        plot.set(xlim=(0, 1.32), xticks=[0, 0.25, 0.5, 0.75, 1], xticklabels=["0", "25 %", "50 %", "75 %", "100 %"])
        plot.tick_params(axis="y", length=0)
        if plot.get_legend_handles_labels()[0]:
            figure.legend(frameon=False, loc="outside lower right", ncols=2)
        return render_svg(figure)


def _draw_stages(score: Mapping[str, Any]) -> str:
    """How many episodes came how far."""
    names, counts = list(score["reached"]), list(score["reached"].values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.4, 0.5 + 0.3 * len(names)), layout="constrained")
        plot = figure.subplots()
        plot.barh(range(len(names)), counts, color=_LIGHT)
        for row, count in enumerate(counts):
            plot.text(count, row, f" {count}", va="center")
        plot.set_yticks(range(len(names)), names)
        plot.set(xlim=(0, 1.15 * max(score["success"]["n"], 1)), xticks=[])
        plot.spines["bottom"].set_visible(False)
        plot.tick_params(axis="y", length=0)
        plot.invert_yaxis()
        return render_svg(figure)
