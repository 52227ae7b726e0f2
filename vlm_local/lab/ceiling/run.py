"""What the command `ceiling` does: play what is missing or predict what is asked, write the pages."""

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError
from vlm_local.lab.ceiling.episodes import SETTINGS, CeilingPlan, Episodes, find_played, list_made_with
from vlm_local.lab.ceiling.error_models import DRAWS
from vlm_local.lab.ceiling.predictions import load_observed, predict
from vlm_local.lab.ceiling.report import write_report
from vlm_local.lab.ceiling.scores import score_study
from vlm_local.lab.ceiling.settings import list_curves, list_settings
from vlm_local.lab.results import ResultFolder
from vlm_local.progress import open_bar


def run_study(path: Path, plan: CeilingPlan, workers: int) -> dict[str, Any]:
    """The curves into the folder `path`; returns the report. Raises ConfigError before anything is played."""
    with _open(path, plan) as (folder, episodes):
        episodes.play_missing("curves", workers)
        return _write_pages(folder, plan, episodes)


def run_predictions(
    path: Path, sources: Sequence[Path], results: Sequence[Path], num_episodes: int, workers: int
) -> dict[str, Any]:
    """Predict results[i] from the answers in sources[i], beside the curves of the folder `path`; returns the report.

    Predictions that were made before stay. Raises ConfigError and DataError before anything is played.
    """
    if len(sources) != len(results):
        raise ConfigError(f"--predict names {len(sources)} folders and --observed {len(results)}; they go in pairs")
    num_tasks = sum(len(load_observed(result)["tasks"]) for result in results)
    plan = find_played(path)
    with _open(path, plan) as (folder, episodes):
        seeds = range(plan.seed, plan.seed + num_episodes)
        with open_bar("predictions", num_tasks * len(DRAWS) * len(seeds), "episode") as bar:
            for source, result in zip(sources, results, strict=True):
                predict(path, source, result, seeds, workers, bar.update)
        return _write_pages(folder, plan, episodes)


@contextmanager
def _open(path: Path, plan: CeilingPlan) -> Iterator[tuple[ResultFolder, Episodes]]:
    settings = list_settings(list_curves())
    with ResultFolder(path, "ceiling", SETTINGS) as folder, closing(Episodes(folder, plan, settings)) as episodes:
        yield folder, episodes


def _write_pages(folder: ResultFolder, plan: CeilingPlan, episodes: Episodes) -> dict[str, Any]:
    made = [json.loads(path.read_bytes()) for path in sorted((folder.path / "predictions").glob("*.json"))]
    scores = score_study(episodes.collect(), plan.tasks, list_curves())
    report = {"plan": asdict(plan), **scores, "predictions": made, **list_made_with(folder.settings)}
    write_report(folder.path, report)
    return report
