"""Scores and rows -> report.json and one self-contained report.html."""

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from vlm_local.errors import DataError
from vlm_local.files import open_replacing, write_json
from vlm_local.lab.offline.plots import draw_confusion, draw_exact, draw_reliability
from vlm_local.lab.offline.rows import Rows
from vlm_local.lab.offline.scores import MIN_STEPS
from vlm_local.primitives import format_phrase
from vlm_local.types import AXES, Episode, Primitive

MAX_FRAMES = 96
_HERE = Path(__file__).parent
_THUMBNAIL_PX = 192
_JPEG_QUALITY = 80


def write_report(folder: Path, report: Mapping[str, Any], rows: Rows, episodes: Iterable[Episode]) -> None:
    """report: `score_rows` plus `policy`, `data` and how it was made. episodes: the data set once more,
    for the frames that are shown; read as far as the last of them.
    """
    write_json(folder / "report.json", report)
    chosen = choose_frames(rows)
    images = load_thumbnails(episodes, rows, chosen)
    frames = [_describe_frame(rows, index) | {"image": images[index]} for index in chosen if index in images]
    baselines = report["baselines"]
    template = open_template("report.html")
    html = template.render(
        report=report,
        frames=frames,
        axes=AXES,
        min_steps=MIN_STEPS,
        confusion=[draw_confusion(axis, report["axes"][axis]["confusion"]) for axis in AXES],
        reliability=draw_reliability(report["reliability"]),
        bars=draw_exact(
            [report["policy"]["name"], *(name.replace("_", "-") for name in baselines)],
            [report["exact"], *(scores["exact"] for scores in baselines.values())],
            [scores["intervals"].get("exact") for scores in (report, *baselines.values())],
        ),
    )
    with open_replacing(folder / "report.html") as file:
        file.write(html)


def open_template(name: str, *folders: Path) -> jinja2.Template:
    """A page of `folders`, else of this one, with the reports' ways to write numbers.

    share, number, interval, probability.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, _HERE, _HERE.parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "share": _format_share,
        "number": _format_number,
        "interval": _format_interval,
        "probability": _format_p,
    }
    return environment.get_template(name)


def choose_frames(rows: Rows) -> list[int]:
    """Indices of the rows to show, worst first: most opposite signs, most wrong signs, surest of it.

    Right answers come last, the least sure first.
    """
    wrong = (rows.answer != rows.label).sum(axis=1)
    opposite = (rows.answer * rows.label < 0).sum(axis=1)
    sureness = np.nan_to_num(rows.probability)
    surprise = np.where(wrong > 0, -sureness, sureness)
    order = np.lexsort((surprise, -wrong, -opposite))  # the last key counts most; ties keep their order
    return order[:MAX_FRAMES].tolist()


def load_thumbnails(episodes: Iterable[Episode], rows: Rows, indices: list[int]) -> dict[int, str]:
    """Row index -> base64 JPEG; a frame that cannot be read (any more) is left out."""
    wanted: dict[int, list[int]] = {}
    for index in indices:
        wanted.setdefault(int(rows.episode_ids[rows.episode[index]]), []).append(index)
    images = {}
    for episode in episodes:
        for index in wanted.pop(episode.index, ()):
            try:
                images[index] = encode_thumbnail(episode.load_image(int(rows.step[index])))
            except DataError:
                continue
        if not wanted:
            break
    return images


def encode_thumbnail(image: np.ndarray) -> str:
    """uint8 (H, W, 3) -> base64 of a small JPEG."""
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _describe_frame(rows: Rows, index: int) -> dict[str, Any]:
    label, answer = rows.label[index].tolist(), rows.answer[index].tolist()
    probability = rows.probability[index]
    marginals = rows.marginals[index]
    answered = bool(rows.answered[index])
    return {
        "episode": int(rows.episode_ids[rows.episode[index]]),
        "step": int(rows.step[index]),
        "instruction": rows.instructions[index],
        "label": rows.label_phrases[index],
        "answer": format_phrase(Primitive(*answer)) if answered else None,
        "probability": float(probability) if np.isfinite(probability) else None,
        "signs": [label, answer],
        "marginals": marginals.round(3).tolist() if np.isfinite(marginals).all() else None,
    }


def _format_share(value: float | None) -> str:
    return "too few" if value is None else f"{value:.1%}".replace("%", " %")


def _format_number(value: float | None) -> str:
    return "too few" if value is None else f"{value:.3g}"


def _format_interval(interval: list[float] | None, as_number: bool = False) -> str:
    if interval is None:
        return ""
    low, high = interval
    return f"{low:.2f} to {high:.2f}" if as_number else f"{100 * low:.0f} to {100 * high:.0f}"


def _format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.2g}"
