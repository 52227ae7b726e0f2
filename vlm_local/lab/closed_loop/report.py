"""Scores and outcomes of a run -> report.json and one self-contained report.html."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_local.data.film import read_picture
from vlm_local.environments import OURS, find_suite, name_episode
from vlm_local.errors import DataError
from vlm_local.lab import pages
from vlm_local.lab.closed_loop.scores import reaches_autoeval
from vlm_local.sim.tasks import AUTOEVAL_STEPS


def write_report(folder: Path, scores: Mapping[str, Any], episodes: Sequence[Mapping[str, Any]]) -> None:
    """Write `folder`/report.json and report.html.

    scores: `score_run`. episodes: as given to `score_run`. What the run was made with is in `folder`/meta.json. Raises
    ConfigError where nothing can be written.
    """
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    report = {**meta, **scores}
    tasks = scores["tasks"]
    ordered = sorted(episodes, key=lambda episode: (list(tasks).index(episode["task"]), episode["number"]))
    faulted = f"{report['faulted']} of {report['episodes']} episodes got no answer from the policy and are in no rate."
    pages.write_report(
        folder,
        "closed_loop/report.html",
        report,
        made=[name for name in meta if name != "simulator"],
        warnings=[faulted] * bool(report["faulted"]) + pages.list_warnings(meta),
        plan=report["simulator"],
        limit=AUTOEVAL_STEPS if reaches_autoeval(report["simulator"]) else None,
        suite=find_suite(report["simulator"].get("env", OURS)),
        episodes=[{**episode, **_find_pictures(folder, episode)} for episode in ordered],
    )


def _find_pictures(folder: Path, episode: Mapping[str, Any]) -> dict[str, Any]:
    """film: relative path, or None. last: base64 JPEG of what came of it, or None."""
    place = folder / "episodes" / name_episode(episode["task"], episode["number"])
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
