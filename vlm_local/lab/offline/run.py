"""An offline evaluation, a straight line: episodes -> an answer a step -> rows -> scores -> report, in one folder."""

import itertools
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.data.selection import OpenData
from vlm_local.errors import ConfigError, DataError
from vlm_local.lab.formats import format_name
from vlm_local.lab.offline import baselines
from vlm_local.lab.offline.answers import Answerer, BaselineAnswerer, PolicyAnswerer
from vlm_local.lab.offline.report import write_report
from vlm_local.lab.offline.rows import RowWriter, hash_labels, load_rows
from vlm_local.lab.offline.scores import score_rows
from vlm_local.lab.offline.tally import GRIPPER_TOLERANCE_STEPS
from vlm_local.lab.results import ResultFolder
from vlm_local.lab.sources import PolicySource
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.provenance import choose_deciding, describe_machine, tell_making
from vlm_local.types import Episode

SETTINGS = "evaluation.json"
_MAY_GROW = ("limit", "episodes")
_SHOWN = 5  # episodes that a refusal names
_ONLY_WHERE_USED = ("examples", "frames", "think")  # which a policy without them does not name


@dataclass(frozen=True)
class EvaluationPlan:
    """What decides the rows. policy: as named by the user. data: path of the data set.

    camera, split, state_layout, embodiment: as data.Selection. every: ask every N-th step. limit: of episodes.
    episodes: names or numbers of those to ask about; all where empty.
    """

    policy: str
    data: str
    camera: str | None = None
    every: int = 1
    limit: int | None = None
    seed: int = 0
    split: str | None = None
    state_layout: str | None = None
    embodiment: str = "auto"
    episodes: tuple[str, ...] = ()


def evaluate(
    plan: EvaluationPlan,
    path: Path,
    open_data: OpenData,
    open_source: Callable[[], PolicySource],
    workers: int = 1,
    known: Mapping[str, Any] | None = None,
    about_data: Mapping[str, Any] | None = None,
    progress: Callable[[float], object] = lambda episodes: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Answer, score and report into the folder `path`; returns the report.

    open_data: from a collector of records that cannot be read to the episodes of the plan; called again for the
    frames in the report. open_source: called only where a baseline is not enough and something is left to ask.
    known: what the policy will say of itself, so that a result of other settings is refused also where nothing is left.
    about_data: what is read of the data set, for the report. progress: is given the share of an episode that was
    done. warn: is told what is left out. Raises ConfigError where the folder holds another result, EngineError where
    the policy fails again and again.
    """
    problems: list[str] = []

    def collect(problem: object) -> None:
        problems.append(str(problem))
        warn(str(problem))

    with ResultFolder(path, "eval", SETTINGS) as folder:
        with closing(RowWriter(path, progress)) as writer:
            here = {"plan": asdict(plan), **({"policy": known} if known else {}), **describe_machine()}
            _refuse_fewer(plan, path, writer.done, open_data)
            folder.begin(here, partial(_list_settings, known or {}), bool(writer.done), grows=("plan",))
            if plan.policy in baselines.NAMES:
                answerers = [_build_baseline(plan, open_data)]
                answer_episodes(open_data(collect), lambda: answerers, writer, plan.every)
            else:
                _ask_policy(folder, plan, open_source, open_data(collect), writer, workers)
        for line in writer.episodes:
            problems += filter(None, [line.get("left_out"), *line.get("unscored", {}).values()])
        rows = load_rows(path)
        report = score_rows(rows, plan.seed) | {
            "policy": {"name": plan.policy, **folder.settings.get("policy", {})},
            "data": _describe_data(plan, about_data or {}),
            "seed": plan.seed,
            "labels_sha256": hash_labels(rows),
            "left_out": problems,
            "gripper_tolerance_steps": GRIPPER_TOLERANCE_STEPS,
            "answer_ms": folder.settings.get("answer_ms"),
            **tell_making(folder.settings),
        }
        write_report(path, report, rows, open_data(lambda problem: None))
        return report


def _describe_data(plan: EvaluationPlan, about: Mapping[str, Any]) -> dict[str, Any]:
    where = {"name": format_name(plan.data), "path": plan.data, "camera": plan.camera}
    return {**where, **about, "every": plan.every, "limit": plan.limit}


def _list_settings(known: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts, as far as the plan says it, and what is known of the policy unloaded."""
    # More episodes may have another majority, and no two of its phrases belong in one result.
    grows = () if made["plan"]["policy"] == "majority" else _MAY_GROW
    plan = {name: value for name, value in made["plan"].items() if name not in grows}
    told = choose_deciding(made.get("policy", {}))
    return plan | {name: told.get(name) for name in (*choose_deciding(known), *_ONLY_WHERE_USED) if known}


def _refuse_fewer(plan: EvaluationPlan, path: Path, done: Collection[int], open_data: OpenData) -> None:
    """Raises ConfigError where the folder has episodes that the plan leaves out: they would be scored, too."""
    if not done:
        return
    if plan.episodes:
        asked: Collection[int] = {episode.index for episode in open_data(lambda problem: None)}
    else:
        asked = done if plan.limit is None else range(plan.limit)
    more = sorted(set(done).difference(asked))
    if more:
        told = ", ".join(map(str, more[:_SHOWN])) + ", ..." * (len(more) > _SHOWN)
        raise ConfigError(
            f"{path} holds answers about episode {told}, which would be scored, too; ask about all that it holds, or "
            "choose another --out"
        )


def _build_baseline(plan: EvaluationPlan, open_data: OpenData) -> Answerer:
    labels = []
    if plan.policy == "majority":  # fitted on the scored steps, so they are read once before
        for episode in open_data(lambda problem: None):
            if len(episode) > 1 and episode.instruction:
                phrases = label_episode(episode.states)[0]
                labels += [phrases[step] for step in range(0, len(episode), plan.every) if episode.instruction_at(step)]
    return BaselineAnswerer(plan.policy, baselines.find_majority(map(format_phrase, labels)), plan.seed)


def _ask_policy(
    folder: ResultFolder,
    plan: EvaluationPlan,
    open_source: Callable[[], PolicySource],
    episodes: Iterable[Episode],
    writer: RowWriter,
    workers: int,
) -> None:
    """Answer what is missing; the folder's settings then say of the policy and how long its answers took."""
    opened: list[PolicySource] = []
    answerers: list[PolicyAnswerer] = []

    def build_answerers() -> Sequence[Answerer]:
        source = open_source()
        opened.append(source)
        here = {**folder.settings, "policy": dict(source.metadata)}
        folder.begin(here, lambda made: choose_deciding(made.get("policy", {})), bool(writer.done))
        num_workers = int(min(workers, source.max_workers))
        answerers.extend(PolicyAnswerer(source.build(f"eval-{worker}"), plan.seed) for worker in range(num_workers))
        return answerers

    try:
        answer_episodes(episodes, build_answerers, writer, plan.every)
    finally:
        for source in opened:
            source.close()
    durations = [duration for answerer in answerers for duration in answerer.durations_ms]
    if durations:
        median, p95 = np.quantile(durations, [0.5, 0.95])
        timing = {"median": float(median), "p95": float(p95), "n": len(durations), "workers": len(answerers)}
        folder.update(answer_ms=timing)


def answer_episodes(
    episodes: Iterable[Episode],
    build_answerers: Callable[[], Sequence[Answerer]],
    writer: RowWriter,
    every: int,
) -> None:
    """Answer every `every`-th step of the episodes that `writer` has not done yet.

    build_answerers: one per worker, called once there is something to answer. What cannot be scored is written down
    with its reason. Raises what an answerer raised; the rows so far stay.
    """
    todo = _skip_done(episodes, writer)
    first = next(todo, None)
    if first is None:
        return
    answerers = build_answerers()
    idle: queue.SimpleQueue[Answerer] = queue.SimpleQueue()
    for answerer in answerers:
        idle.put(answerer)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(answerer: Answerer, episode: Episode) -> None:
        try:
            _answer_episode(episode, answerer, writer, every, stop)
        except BaseException as error:
            failures.append(error)
            stop.set()
        finally:
            idle.put(answerer)

    with ThreadPoolExecutor(len(answerers)) as pool:
        try:
            for episode in itertools.chain([first], todo):
                answerer = idle.get()  # reading waits for a worker, so memory does not grow
                if stop.is_set():
                    break
                pool.submit(work, answerer, episode)
        except BaseException:  # Ctrl-C, too: workers leave their episode, which the next run asks again
            stop.set()
            raise
    if failures:
        raise failures[0]


def _skip_done(episodes: Iterable[Episode], writer: RowWriter) -> Iterator[Episode]:
    for episode in episodes:
        if episode.index in writer.done:
            writer.progress(1)
        else:
            yield episode


def _answer_episode(episode, answerer, writer, every, stop) -> None:
    try:
        labels, full_windows = label_episode(episode.states)
        if not episode.instruction:
            raise DataError("the episode has no instruction, so nobody can be asked")
    except DataError as error:
        reason = f"{episode.source}: {error}"
        writer.finish_episode({"episode": episode.index, "steps": len(episode), "left_out": reason})
        writer.progress(1)
        return
    phrases = [format_phrase(label) for label in labels]
    steps = range(0, len(episode), every)
    unscored = {
        step: f"{episode.source}, step {step}: the step has no instruction"
        for step in steps
        if not episode.instruction_at(step)
    }
    asked = [step for step in steps if step not in unscored]
    for step, fields in answerer.answer(episode, phrases, asked, unscored):
        if stop.is_set():
            return
        writer.add_row(_build_row(episode, step, phrases, full_windows[step]) | fields)
        writer.progress(1 / len(steps))
    writer.progress(len(unscored) / len(steps))
    writer.finish_episode({"episode": episode.index, "steps": len(episode), "unscored": unscored})


def _build_row(episode: Episode, step: int, phrases: Sequence[str], full_window: bool) -> dict[str, Any]:
    return {
        "episode": episode.index,
        "step": step,
        "instruction": episode.instruction_at(step),
        "label": phrases[step],
        "previous_label": phrases[step - 1] if step else None,
        "full_window": full_window,
        "recorded_action": None if episode.actions is None else np.round(episode.actions[step].astype(float), 6),
    }
