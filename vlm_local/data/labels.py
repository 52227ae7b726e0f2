"""Ground-truth phrases of recorded episodes, as rows."""

from collections.abc import Iterable, Iterator
from typing import Any

from vlm_local.errors import DataError, Report
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.types import Episode


def iterate_labels(episodes: Iterable[Episode], report: Report) -> Iterator[dict[str, Any]]:
    """A row a step: episode, step, phrase, full_window. Episodes without a label go to `report`."""
    for episode in episodes:
        try:
            labels, full_windows = label_episode(episode.states)
        except DataError as error:
            report(DataError(f"{episode.source}: {error}"))
            continue
        for step, (label, full_window) in enumerate(zip(labels, full_windows, strict=True)):
            yield {
                "episode": episode.index,
                "step": step,
                "phrase": format_phrase(label),
                "full_window": full_window,
            }
