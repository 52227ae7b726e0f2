"""A whole offline evaluation: settings, answers, rows, scores, report, in one folder."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vlm_local.errors import ConfigError, DataError
from vlm_local.files import write_json
from vlm_local.lab.offline import baselines
from vlm_local.lab.offline.answers import Answerer, BaselineAnswerer, PolicyAnswerer
from vlm_local.lab.offline.report import write_report
from vlm_local.lab.offline.rows import RowWriter, hash_labels, load_rows
from vlm_local.lab.offline.run import run_evaluation
from vlm_local.lab.offline.scores import score_rows
from vlm_local.lab.offline.tally import GRIPPER_TOLERANCE_STEPS
from vlm_local.policy import Policy
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.provenance import describe_machine
from vlm_local.types import Episode

_SETTINGS = "evaluation.json"

# What may not change between a run and its resumption.
_IDENTITY = (
    "model",
    "checkpoint_sha256",
    "quantize",
    "dtype",
    "grammar",
    "prompt",
    "steps",
    "decide",
    "temperature",
    "history",
    "steps_per_phrase",
)


class PolicySource(Protocol):
    """What policies come from, one per worker."""

    metadata: Mapping[str, Any]

    def build(self, robot: str) -> Policy: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """What decides the rows. policy: as named by the user. data: path of the data set.

    camera, split, state_layout: as data.Selection.
    """

    policy: str
    data: str
    camera: str | None = None
    every: int = 1
    limit: int | None = None
    seed: int = 0
    split: str | None = None
    state_layout: str | None = None


def evaluate(
    plan: Plan,
    folder: Path,
    open_data: Callable[[Callable[[DataError], None]], Iterator[Episode]],
    open_policies: Callable[[], PolicySource],
    workers: int = 1,
    resume: bool = False,
    about_data: Mapping[str, Any] | None = None,
    progress: Callable[[float], None] = lambda episodes: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answer, score and report into `folder`; returns the report.

    open_data: from a collector of records that cannot be read to the episodes of the plan; called
    again for the frames in the report. open_policies: called only where a baseline is not enough and
    something is left to ask. about_data: what is read of the data set, for the report. warn: is told what is
    left out.
    """
    problems: list[str] = []

    def collect(problem: object) -> None:
        problems.append(str(problem))
        warn(str(problem))

    writer = RowWriter(folder, resume)
    made_by = _load_settings(folder, plan, writer.is_begun)
    with closing(writer):
        if plan.policy in baselines.NAMES:
            answerers = [_build_baseline(plan, open_data)]
            run_evaluation(open_data(collect), lambda: answerers, writer, plan.every, progress)
        else:
            made_by |= _ask_policies(
                plan, folder, made_by, open_policies, open_data(collect), writer, workers, progress
            )
    for line in writer.episodes:
        problems += filter(None, [line.get("left_out"), *line.get("unscored", {}).values()])
    rows = load_rows(folder)
    report = score_rows(rows, plan.seed) | {
        "policy": {"name": plan.policy, **made_by.get("policy", {})},
        "data": {
            "name": Path(plan.data).name or plan.data,
            "path": plan.data,
            "camera": plan.camera,
            **(about_data or {}),
            "every": plan.every,
            "limit": plan.limit,
        },
        "seed": plan.seed,
        "labels_sha256": hash_labels(rows),
        "left_out": problems,
        "gripper_tolerance_steps": GRIPPER_TOLERANCE_STEPS,
        "answer_ms": made_by.get("answer_ms"),
        **describe_machine(),
    }
    write_report(folder, report, rows, open_data(lambda problem: None))
    return report


def _build_baseline(plan: Plan, open_data) -> Answerer:
    labels = []
    if plan.policy == "majority":  # fitted on the scored steps, so they are read once before
        for episode in open_data(lambda problem: None):
            if len(episode) > 1 and episode.instruction:
                phrases = label_episode(episode.states)[0]
                labels += [phrases[step] for step in range(0, len(episode), plan.every) if episode.instruction_at(step)]
    return BaselineAnswerer(plan.policy, baselines.find_majority(map(format_phrase, labels)), plan.seed)


def _ask_policies(plan, folder, made_by, open_policies, episodes, writer, workers, progress) -> dict[str, Any]:
    """Run the evaluation; returns what the policy says of itself and how long its answers took."""
    opened: list[PolicySource] = []
    answerers: list[PolicyAnswerer] = []

    def build_answerers() -> Sequence[Answerer]:
        source = open_policies()
        opened.append(source)
        answerers.extend(PolicyAnswerer(source.build(f"eval-{worker}"), plan.seed) for worker in range(workers))
        _check_same_policy(folder, made_by.get("policy"), source.metadata)
        write_json(folder / _SETTINGS, {"plan": vars(plan), **made_by, "policy": dict(source.metadata)})
        return answerers

    try:
        run_evaluation(episodes, build_answerers, writer, plan.every, progress)
        durations = [duration for answerer in answerers for duration in answerer.durations_ms]
        if not durations:
            return {}
        median, p95 = np.quantile(durations, [0.5, 0.95])
        timing = {"median": float(median), "p95": float(p95), "n": len(durations), "workers": workers}
        made = {"policy": dict(opened[0].metadata), "answer_ms": timing}
        write_json(folder / _SETTINGS, {"plan": vars(plan), **made})
        return made
    finally:
        for source in opened:
            source.close()


def _check_same_policy(folder: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Rows of two policies must not mix."""
    changed = [name for name in _IDENTITY if before is not None and before.get(name) != now.get(name)]
    if changed:
        was = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in changed)
        raise ConfigError(f"the rows in {folder} are of another policy: {was}; choose another --out")


def _load_settings(folder: Path, plan: Plan, is_begun: bool) -> dict[str, Any]:
    """evaluation.json of the run that is gone on with, or a new one. --limit alone may change.

    is_begun: whether it has written a row; before that every plan may take the folder.
    """
    path = folder / _SETTINGS
    if not (is_begun and path.exists()):
        write_json(path, {"plan": vars(plan)})
        return {}
    saved = json.loads(path.read_bytes())
    before, now = ({**settings, "limit": None} for settings in (saved.pop("plan"), vars(plan)))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        was = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
        raise ConfigError(f"{folder} was made with {was}; go on with the same, or choose another --out")
    return saved
