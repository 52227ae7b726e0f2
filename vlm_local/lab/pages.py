"""The reports' pages: one layout and style sheet, the same figures and numbers, written in one step.

A study's page extends templates/base.html, which shows title, cards, warnings and how the result was made.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vlm_local.data.images import encode_file
from vlm_local.files import encode_json, open_replacing, write_json
from vlm_local.lab import formats
from vlm_local.provenance import HOW_MADE

BLUE, LIGHT_BLUE, ORANGE, GREEN, RED, GREY, BLACK = (
    *("#2166ac", "#9ec5e6", "#d9822b", "#1e7d46", "#c0392b", "#8a8f98", "#1d2430"),
)
QUARTERS = ([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])  # ticks of an axis of shares

# Decorates functions that draw or save. Figures are made without pyplot, whose state is global.
styled = matplotlib.rc_context(
    {
        "svg.fonttype": "none",  # the browser's own letters: small and selectable
        "svg.hashsalt": "vlm-local",  # the same figure is the same text
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,  # names are shown as they are; one such as "$a$" is no formula
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "xtick.color": "#5d6673",
        "ytick.color": "#5d6673",
    }
)

_LAB = Path(__file__).parent
_THUMBNAIL_PX = 192
_JPEG_QUALITY = 80
_MAX_LEFT_OUT = 10


def write_report(folder: Path, template: str, report: Mapping[str, Any], made: Sequence[str], **values: Any) -> None:
    """Write `folder`/report.json, and report.html as write_page does."""
    write_json(folder / "report.json", report)
    write_page(folder / "report.html", template, report, made, **values)


def write_page(path: Path, template: str, report: Mapping[str, Any], made: Sequence[str], **values: Any) -> None:
    """Render `template` (a path below lab/) to `path`, which is replaced in one step.

    The template sees `report` and `values`. made: fields of the report that the page's foot shows beside versions, git
    and machine. values: those that base.html shows are `cards`, (number, what it is) each, and `warnings`, sentences.
    Raises ConfigError where nothing can be written, jinja2.UndefinedError for a value that the template lacks.
    """
    foot = {name: report[name] for name in (*made, *HOW_MADE) if name in report}
    values = {"report": report, "made": encode_json(foot, indent=1), "cards": (), "warnings": (), **values}
    text = _open_environment().get_template(template).render(values)
    with open_replacing(path) as file:
        file.write(text)


@cache
def _open_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_LAB), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    names = ("share", "points", "span", "fixed", "range", "number", "p", "name")
    environment.filters |= {name: getattr(formats, f"format_{name}") for name in names}
    return environment


def list_warnings(policy: Mapping[str, Any], left_out: Sequence[str] = ()) -> list[str]:
    """What a reader must know first. policy: its metadata. left_out: why each thing is in no score."""
    warnings = []
    if policy.get("trained") is False:
        warnings.append("This model's weights are untrained: its scores say nothing about a trained one.")
    warnings += [f"Left out: {reason}" for reason in left_out[:_MAX_LEFT_OUT]]
    if len(left_out) > _MAX_LEFT_OUT:
        warnings.append(f"and {len(left_out) - _MAX_LEFT_OUT} more; all are in report.json")
    return warnings


def encode_thumbnail(image: np.ndarray) -> str:
    """uint8 (H, W, 3) -> base64 of a small JPEG."""
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return base64.b64encode(encode_file(np.asarray(picture), "JPEG", quality=_JPEG_QUALITY)).decode()


@styled
def render_svg(figure: Figure) -> str:
    """An <svg> element to put into a page; the same figure gives the same text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


@styled
def draw_reliability(bins: Sequence[Sequence[float]]) -> str | None:
    """Share of right answers against the probability given to them, as SVG; None without probabilities.

    bins: (NUM_BINS, 3) number of answers, sum of their probabilities, number of right ones. A larger dot has more.
    """
    counts, sums, right = np.array(bins).T
    seen = counts > 0
    if not seen.any():
        return None
    figure = Figure(figsize=(3.4, 3.3), layout="constrained")
    plot = figure.subplots()
    plot.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    mean, share = sums[seen] / counts[seen], right[seen] / counts[seen]
    plot.plot(mean, share, color=BLUE, linewidth=1.5)
    plot.scatter(
        mean, share, s=20 + 300 * counts[seen] / counts.sum(), color=BLUE, alpha=0.75, label="answers", clip_on=False
    )
    for x, y, count in zip(mean, share, counts[seen], strict=True):
        plot.annotate(f"{count:.0f}", (x, y), textcoords="offset points", xytext=(0, 9), ha="center")
    plot.set(xlim=(0, 1), ylim=(-0.02, 1.08))
    plot.set(xlabel="probability given to the answer", ylabel="share of right answers")
    plot.legend(frameon=False, loc="upper left")
    return render_svg(figure)
