"""What a server recorded of a job, and what became of it by AutoEval's own files, in one table.

Nothing in either names the other. A rollout's actions are the numbers that the server sent, so they are the key: a
recorded episode belongs to the rollout with its instruction whose actions it holds, from the first to the last.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.data.autoeval import Outcome, read_outcomes
from vlm_local.data.runs import RecordedEpisode, read_run
from vlm_local.errors import DataError, Report
from vlm_local.lab.statistics import describe_rate


def join_outcomes(recording: Path, eval_data: Path, report: Report) -> dict[str, Any]:
    """The table. Raises DataError where not one rollout is found in the recording.

    episodes: a row a rollout; success: by instruction, as describe_rate; unmatched: rollouts that are not recorded.
    Rollouts that fit several episodes take them in order, and go to `report`.
    """
    episodes = [episode for episode in read_run(recording, report) if episode.lines]
    sent = [_stack_actions(episode) for episode in episodes]
    rows, unmatched, taken = [], [], set()
    for outcome in read_outcomes(eval_data, report):
        found = [
            index
            for index, (episode, actions) in enumerate(zip(episodes, sent, strict=True))
            if _holds(actions, outcome.actions) and _fits(outcome.instruction, episode.lines[0].get("instruction"))
        ]
        index = next((index for index in found if index not in taken), None)
        if index is None:
            unmatched.append(outcome.source)
            continue
        if len(found) > 1:
            names = ", ".join(Path(episodes[index].source).name for index in found)
            report(DataError(f"{outcome.source}: {names} have its actions alike, so which of them it is is a guess"))
        taken.add(index)
        rows.append(_build_row(episodes[index], outcome, eval_data))
    if not rows:
        raise DataError(f"no rollout below {eval_data} has the actions of an episode in {recording}: another job?")
    return {"success": _count_successes(rows), "matched": len(rows), "unmatched": unmatched, "episodes": rows}


def _stack_actions(episode: RecordedEpisode) -> np.ndarray | None:
    """float64 (T, 7) as sent; None where a step was lost and the rollout cannot be told by them."""
    actions = [line.get("action") for line in episode.lines]
    return None if any(action is None for action in actions) else np.array(actions, np.float64)


def _holds(sent: np.ndarray | None, answered: np.ndarray) -> bool:
    """Whether an episode is this rollout; one that motors interrupted may have gone on a step in the recording."""
    return sent is not None and 0 <= len(sent) - len(answered) <= 1 and np.array_equal(sent[: len(answered)], answered)


def _fits(said: str, recorded: str | None) -> bool:
    """Whether two instructions are one; a rollout or a recording may have none."""
    return not said or not recorded or said.strip() == recorded.strip()


def _build_row(episode: RecordedEpisode, outcome: Outcome, eval_data: Path) -> dict[str, Any]:
    lines, source = episode.lines, Path(outcome.source)
    return {
        "episode": Path(episode.source).name,
        "rollout": source.name if source == eval_data else str(source.relative_to(eval_data)),
        "instruction": outcome.instruction,
        "success": outcome.success,
        "steps": len(lines),
        "probability": _average(lines, "probability"),
        "margin": _average(lines, "margin"),
        "faults": sum(line.get("fault") is not None for line in lines),
        "cut": sum("cut" in _read_fields(line, "extra") for line in lines),
        "shadow_notes": sum(_read_fields(line, "shadow").get("note") is not None for line in lines),
    }


def _read_fields(line: dict[str, Any], name: str) -> dict[str, Any]:
    fields = line.get(name)
    return fields if isinstance(fields, dict) else {}


def _average(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line.get(name) for line in lines]
    values = [value for value in values if isinstance(value, int | float) and np.isfinite(value)]
    return float(np.mean(values)) if values else None


def _count_successes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    told = defaultdict(list)
    for row in rows:
        if row["success"] is not None:
            told[row["instruction"]].append(row["success"])
    return {instruction: describe_rate(sum(ends), len(ends)) for instruction, ends in sorted(told.items())}


def format_outcomes(table: Mapping[str, Any]) -> str:
    """For a terminal, a line a rollout."""
    width = max(len("rollout"), *(len(row["rollout"]) for row in table["episodes"])) + 2
    lines = [f"{'episode':16}{'rollout':{width}}{'success':9}{'steps':>6}{'p':>7}{'faults':>8}  instruction"]
    for row in table["episodes"]:
        success = {True: "yes", False: "no", None: "-"}[row["success"]]
        probability = "-" if row["probability"] is None else f"{row['probability']:.2f}"
        lines.append(
            f"{row['episode']:16}{row['rollout']:{width}}{success:9}{row['steps']:6}{probability:>7}{row['faults']:8}  "
            f"{row['instruction']}"
        )
    return "\n".join(lines)
