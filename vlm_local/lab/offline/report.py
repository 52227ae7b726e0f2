"""Scores and rows -> report.json, one self-contained report.html, and a table for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.lab import pages
from vlm_local.lab.formats import format_p, format_points, format_share, format_span
from vlm_local.lab.offline.rows import Rows
from vlm_local.lab.offline.scores import MIN_STEPS
from vlm_local.primitives import format_phrase
from vlm_local.types import AXES, Episode, Primitive

MAX_FRAMES = 96
TOO_FEW = "too few"  # instead of a share of fewer than MIN_STEPS steps


def write_report(folder: Path, report: Mapping[str, Any], rows: Rows, episodes: Iterable[Episode]) -> None:
    """Write `folder`/report.json and report.html.

    report: `score_rows` with `policy`, `data` and how it was made. episodes: the data set once more, for
    the frames that are shown; read as far as the last of them. Raises ConfigError where nothing can be written.
    """
    chosen = choose_frames(rows)
    images = load_thumbnails(episodes, rows, chosen)
    unanswered = f"{report['unanswered']} steps got no answer, because the policy failed; they count as not exact."
    pages.write_report(
        folder,
        "offline/report.html",
        report,
        made=("policy", "data", "seed", "labels_sha256", "answer_ms"),
        cards=_list_cards(report),
        warnings=[unanswered] * bool(report["unanswered"]) + pages.list_warnings(report["policy"], report["left_out"]),
        frames=[_describe_frame(rows, index) | {"image": images[index]} for index in chosen if index in images],
        axes=AXES,
        min_steps=MIN_STEPS,
        too_few=TOO_FEW,
        maps=[build_map(axis, report["axes"][axis]["confusion"]) for axis in AXES],
        reliability=pages.draw_reliability(report["reliability"]),
    )


def _list_cards(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    majority, span = report["baselines"]["majority"], format_span(report["intervals"].get("exact"))
    return [
        (format_share(report["exact"]), "exact phrase" + (f", {span} %" if span else "")),
        (format_share(majority["exact"]), f"always “{majority['phrase']}”"),
        (format_share(report["baselines"]["repeat_last"]["exact"]), "repeating the last true label"),
        (format_share(report["opposite"], TOO_FEW), "opposite direction, of moving axes"),
        (
            format_share(report["moving"]["exact"], TOO_FEW),
            f"exact on moving steps ({report['counts']['moving.exact']})",
        ),
    ]


def build_map(axis: str, confusion: Sequence[Sequence[int]]) -> dict[str, Any]:
    """An axis's heat map for the page. confusion: (3, 3) counts, label down and answer across, in the order -, 0, +.

    `words` of the three signs, and `rows` of three cells each: `text`, the count and the share of its label's row (the
    count alone where the label is too rare for a share to mean anything), `share`, and whether it is `opposite`.
    """
    words = [format_phrase(Primitive(**{axis: sign})) for sign in (-1, 1)]
    minus, plus = (word.removeprefix("move ").removeprefix("rotate ").removesuffix(" gripper") for word in words)
    plus = plus.replace("counter", "counter\u00ad")  # a long word may break here
    rows = []
    for row, counts in enumerate(confusion):
        total, cells = sum(counts), []
        for column, count in enumerate(counts):
            share = count / total if total else 0.0
            text = f"{count}\n{format_share(share, decimals=0)}" if total >= MIN_STEPS else str(count) * bool(total)
            cells.append({"text": text, "share": share, "opposite": abs(row - column) == 2})
        rows.append(cells)
    return {"axis": axis, "words": (minus, "none", plus), "rows": rows}


def choose_frames(rows: Rows) -> list[int]:
    """Indices of the rows to show, worst first: most opposite signs, most wrong signs, highest probability.

    Right answers come last, the least probable first.
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
                images[index] = pages.encode_thumbnail(episode.load_image(int(rows.step[index])))
            except DataError:
                continue
        if not wanted:
            break
    return images


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


def format_report(report: Mapping[str, Any]) -> str:
    """A table for a terminal: the policy's headline scores, its baselines' below."""
    lines = [
        f"{report['steps']} steps of {report['episodes']} episodes, {len(report['left_out'])} left out",
        f"{'':24}{'exact':>8}  {'95 %':>12}{'moving':>9}{'all axes':>10}{'opposite':>10}{'lead':>8}{'p':>8}",
        _format_scores(report["policy"]["name"], report),
    ]
    lines += [_format_scores(name.replace("_", "-"), scores) for name, scores in report["baselines"].items()]
    lines.append("lead: of the policy over the baseline in percentage points; p: permutation test over episodes")
    if report["unanswered"]:
        lines.append(f"{report['unanswered']} steps got no answer and count as wrong")
    return "\n".join(lines)


def _format_scores(name: str, scores: Mapping[str, Any]) -> str:
    shares = (scores["exact"], scores["moving"]["exact"], scores["axis_accuracy"], scores["opposite"])
    exact, moving, axes, opposite = (format_share(share, TOO_FEW) for share in shares)
    interval = format_span(scores["intervals"].get("exact"))
    shown = name if len(name) < 24 else f"...{name[-20:]}"  # models in one folder differ at their end
    line = f"{shown:24}{exact:>8}  {interval:>12}{moving:>9}{axes:>10}{opposite:>10}"
    lead = scores.get("lead")
    return f"{line}{format_points(lead['difference'], 1, '+'):>8}{format_p(lead['p_value']):>8}" if lead else line
