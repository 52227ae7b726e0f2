"""Recorded answers -> confusion matrices: how often each sign was said where the oracle said each sign.

Two kinds of result folder can be counted. Of `sim`: every line of steps.jsonl has the policy's phrase and
the oracle's for the same state, so the states are those that the policy reached itself ("closed loop"). Of `eval`: the
policy was asked about recorded steps. If these are a run of `sim`, the truth is the oracle's phrase in that run
("offline"), not ECoT's label of the motion that followed, which looks three steps ahead and ignores what is below a
threshold. In any other data set the labels are the truth ("labels"); its tasks are unknown, so the counts stand for
every task.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_local.data.runs import RECORDED_RUN, read_run
from vlm_local.errors import DataError, refuse
from vlm_local.files import read_json_lines, read_json_object
from vlm_local.lab.results import find_layout
from vlm_local.primitives import parse_phrase
from vlm_local.types import AXES

OFFLINE, CLOSED, LABELS = "offline", "closed loop", "labels"
ANY_TASK = "any"

Answers = tuple[str, int, str, str]  # task, episode, what was right, what was said


@dataclass(frozen=True)
class ConfusionMatrices:
    """counts: task (or ANY_TASK) -> int (episodes, 6, 3, 3) [episode, axis, right sign, said sign] for -, 0, +."""

    kind: str
    counts: dict[str, np.ndarray]


def load_confusion_matrices(folder: Path) -> ConfusionMatrices:
    """Of the --out of `eval` or `sim`. Raises DataError for anything else, or where nothing was answered."""
    kind = find_layout(folder).kind
    if kind == "sim":
        name, answers = CLOSED, list(_read_simulation(folder))
    elif kind == "eval":
        name, answers = _read_evaluation(folder)
    else:
        raise DataError(f"{folder} is a result of `{kind}`; expected one of `eval` or of `sim`")
    if not answers:
        raise DataError(f"{folder} holds no answered step, so there is nothing to count")
    return ConfusionMatrices(name, count_answers(answers))


def count_answers(answers: Iterable[Answers]) -> dict[str, np.ndarray]:
    """Task -> int (episodes, 6, 3, 3), as in ConfusionMatrices."""
    episodes: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for task, episode, right, said in answers:
        episodes.setdefault((task, episode), []).append((right, said))
    tasks = dict.fromkeys(task for task, _ in episodes)
    return {task: np.stack([_count(pairs) for (of, _), pairs in episodes.items() if of == task]) for task in tasks}


def _count(pairs: list[tuple[str, str]]) -> np.ndarray:
    """(right, said) phrases of an episode -> int (6, 3, 3)."""
    signs = np.array([[parse_phrase(right), parse_phrase(said)] for right, said in pairs]) + 1
    counts = np.zeros((len(AXES), 3, 3), int)
    np.add.at(counts, (np.arange(len(AXES)), signs[:, 0], signs[:, 1]), 1)
    return counts


def _read_simulation(folder: Path) -> Iterator[Answers]:
    for episode in read_run(folder, refuse):
        for line in episode.lines:
            if line["phrase"]:
                yield episode.meta["task"], episode.index, line["oracle"], line["phrase"]


def _read_evaluation(folder: Path) -> tuple[str, list[Answers]]:
    rows = [row for row in read_json_lines(folder / "rows.jsonl") if row["phrase"]]
    data = Path(read_json_object(folder / "evaluation.json")["plan"]["data"])
    about = read_json_object(folder / "report.json").get("data", {})
    if about.get("format") == RECORDED_RUN and not data.is_dir():
        raise DataError(
            f"{folder} is of the recorded run {data}, which is not there from here: whether it is one of `sim`, whose "
            "oracle is the truth, cannot be seen"
        )
    if not _is_simulation(data):
        return LABELS, [(ANY_TASK, row["episode"], row["label"], row["phrase"]) for row in rows]
    recorded = {episode.index: (episode.meta["task"], episode.lines) for episode in read_run(data, refuse)}
    answers = []
    for row in rows:
        task, lines = recorded[row["episode"]]
        answers.append((task, row["episode"], lines[row["step"]]["oracle"], row["phrase"]))
    return OFFLINE, answers


def _is_simulation(data: Path) -> bool:
    try:
        return "simulator" in read_json_object(data / "meta.json")
    except (OSError, ValueError):
        return False
