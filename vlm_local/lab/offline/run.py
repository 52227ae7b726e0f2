"""One evaluation, a straight line: episodes -> an answer a step -> rows. Scoring comes later, from rows."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.lab.offline.answers import Answerer
from vlm_local.lab.offline.rows import RowWriter
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.types import Episode


def run_evaluation(
    episodes: Iterable[Episode],
    build_answerers: Callable[[], Sequence[Answerer]],
    writer: RowWriter,
    every: int = 1,
    progress: Callable[[float], None] = lambda episodes: None,
) -> None:
    """Answer every `every`-th step of the episodes that `writer` has not done yet.

    build_answerers: one per worker, asked for once there is something to answer. progress: is given
    the share of an episode that was done. What cannot be scored is written down with its reason.
    Raises what an answerer raised; the rows so far stay.
    """
    todo = _skip_done(episodes, writer, progress)
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
            _answer_episode(episode, answerer, writer, every, progress, stop)
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
        except BaseException:  # Ctrl-C, too: workers leave their episode, which a resumed run does again
            stop.set()
            raise
    if failures:
        raise failures[0]


def _skip_done(episodes: Iterable[Episode], writer: RowWriter, progress: Callable[[float], None]) -> Iterator[Episode]:
    for episode in episodes:
        if episode.index in writer.done:
            progress(1)
        else:
            yield episode


def _answer_episode(episode, answerer, writer, every, progress, stop) -> None:
    reason = (
        None if episode.instruction else f"{episode.source}: the episode has no instruction, so nobody can be asked"
    )
    try:
        labels, full_windows = label_episode(episode.states)
    except DataError as error:
        reason = f"{episode.source}: {error}"
    if reason is not None:
        writer.finish_episode({"episode": episode.index, "steps": len(episode), "left_out": reason})
        progress(1)
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
        progress(1 / len(steps))
    progress(len(unscored) / len(steps))
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
