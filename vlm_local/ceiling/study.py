"""What the command `ceiling` does: play what is missing, predict what is asked, write the pages."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlm_local.ceiling.episodes import Episodes, Plan
from vlm_local.ceiling.predictions import DRAWS, load_observed, predict
from vlm_local.ceiling.report import write_report
from vlm_local.ceiling.scores import score_study
from vlm_local.ceiling.settings import list_curves, list_settings
from vlm_local.errors import ConfigError
from vlm_local.provenance import describe_machine


def run_study(
    folder: Path, plan: Plan, workers: int, sources: Sequence[Path] = (), results: Sequence[Path] = ()
) -> dict[str, Any]:
    """Everything into `folder`; returns the report. sources[i]: answers from which results[i] is predicted.

    Predictions that were made before stay in the report. Raises ConfigError and DataError before anything
    is played where an argument cannot be used.
    """
    if len(sources) != len(results):
        raise ConfigError(f"--predict names {len(sources)} folders and --observed {len(results)}; they go in pairs")
    tasks = [len(load_observed(result)["tasks"]) for result in results]
    curves = list_curves()
    episodes = Episodes(folder, plan, list_settings(curves))
    missing = episodes.find_missing()
    with tqdm(total=len(missing), unit="episode", desc="curves", disable=None) as bar:
        episodes.play(missing, workers, bar.update)
    with tqdm(total=sum(tasks) * len(DRAWS) * plan.episodes, unit="episode", desc="predictions", disable=None) as bar:
        for source, result in zip(sources, results, strict=True):
            predict(folder, source, result, plan, workers, bar.update)
    predictions = [json.loads(path.read_bytes()) for path in sorted((folder / "predictions").glob("*.json"))]
    scores = score_study(episodes.collect(), plan.tasks, curves)
    report = {"plan": asdict(plan), **scores, "predictions": predictions, **describe_machine()}
    write_report(folder, report)
    return report
