"""The episodes of a station's job, to be compared with those of jobs from the same seeds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines
from vlm_local.lab.comparison import Measure, Trials, describe_making, read_report, stack_scores
from vlm_local.plain import hide_secrets

_SETTINGS = ("task", "max_steps", "clock", "reset_policy")  # with another reset policy a seed is another scene


def load_trials(folder: Path) -> Trials:
    """folder: the --out of `station`. Raises DataError for one without an episode that was answered throughout.

    Scores: "success" in truth at the end of the episode, when AutoEval judges, and "reached": at any step. Episodes in
    which something would have ended the job are no trials.
    """
    report = read_report(folder)
    plan = report["station"]
    broken = {event["episode"] for event in report["would_have_ended"]}
    played: dict[int, list[dict]] = {}
    for line in read_json_lines(folder / "station.jsonl"):
        played.setdefault(line["episode"], []).append(line)
    episodes = {episode: lines for episode, lines in played.items() if episode not in broken}
    if not episodes:
        raise DataError(f"{folder}: there is no episode in which nothing would have ended the job")
    ended = [lines[-1]["success"] for lines in episodes.values()]
    reached = [any(line["success"] for line in lines) for lines in episodes.values()]
    keys = [f"seed {plan['seed'] + number}" for number in episodes]
    always = np.ones(len(keys))
    return Trials(
        kind="station",
        noun="episode",
        truth_noun="first state",
        settings={**{name: plan[name] for name in _SETTINGS}, "box": _name_box(report)},
        about=describe_making(report, {"name": hide_secrets(plan["url"])}),
        measures=(Measure("success"), Measure("reached")),
        keys=keys,
        units=np.array(keys),
        truths=[[round(number, 3) for number in lines[0]["sent"]] for lines in episodes.values()],
        scores=stack_scores({"success": (ended, always), "reached": (reached, always)}),
        left_out=len(played) - len(episodes),
    )


def _name_box(report: Mapping[str, Any]) -> str:
    """What the steps were cut to."""
    if report["station"]["human_eval"]:
        return "none"
    return "the station's" if "workspace_m" in report else "the simulator's"  # of jobs from before a station's
