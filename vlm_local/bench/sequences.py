"""What robots really say, step after step: the input of the decoding benchmark."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlm_local.data import open_episodes
from vlm_local.data.runs import read_run
from vlm_local.errors import ConfigError, refuse
from vlm_local.files import parse_json, read_foreign_json_lines
from vlm_local.primitives import format_phrase, iterate_labels
from vlm_local.types import Primitive

GENERATED = "generated: a phrase is held for 1 to 5 steps, then one axis changes"


@dataclass(frozen=True, eq=False)
class PlayedEpisode:
    """phrases: one a step. load_image: step -> uint8 (H, W, 3), or None where there are no pictures.

    proprios: (7,) as Observation.proprio for each step, None where there are none.
    """

    instruction: str
    phrases: tuple[str, ...]
    load_image: Callable[[int], np.ndarray] | None = None
    proprios: Sequence[np.ndarray | None] | None = None


def load_sequences(path: Path | None) -> tuple[str, list[PlayedEpisode]]:
    """Episodes and where they come from: a run folder (what was said), a data set (its labels), a file
    of labels (`label` writes them, JSON lines; or one JSON object with episodes and their phrases).

    path: None for made-up ones. Raises ConfigError or DataError where there is nothing to play.
    """
    if path is None:
        return GENERATED, list(_generate())
    if path.is_file():
        episodes = list(_read_labels(path))
    elif (path / "episodes").is_dir():
        episodes = list(_read_run(path))
    else:
        episodes = list(_label(path))
    if not episodes:
        raise ConfigError(f"--sequences {path}: no episode with a phrase at every step")
    return path.name, episodes


def _read_run(path: Path) -> Iterator[PlayedEpisode]:
    for episode in read_run(path, refuse):
        phrases = tuple(phrase for line in episode.lines if (phrase := line.get("phrase")))
        if 0 < len(phrases) == len(episode.lines):
            instruction = episode.lines[0].get("instruction") or ""
            told = [line.get("proprio") for line in episode.lines]
            proprios = [None if each is None else np.array(each, dtype=np.float64) for each in told]
            yield PlayedEpisode(instruction, phrases, episode.load_image, proprios)


def _refuse_line(problem: str) -> None:
    raise ValueError(problem)


def _read_labels(path: Path) -> Iterator[PlayedEpisode]:
    try:
        if path.suffix == ".json":
            for episode in parse_json(path.read_text())["episodes"]:
                yield PlayedEpisode(episode.get("instruction") or "", tuple(episode["phrases"]))
            return
        rows = list(read_foreign_json_lines(path, _refuse_line))
        for _, steps in itertools.groupby(rows, key=lambda row: row["episode"]):
            yield PlayedEpisode("", tuple(row["phrase"] for row in steps))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--sequences {path} is no file of labels: {error!r}") from error


def _label(path: Path) -> Iterator[PlayedEpisode]:
    for episode in open_episodes(path):
        phrases = tuple(row["phrase"] for row in iterate_labels([episode], lambda error: None))
        if phrases:
            yield PlayedEpisode(episode.instruction, phrases, episode.load_image, list(episode.states))


def _generate() -> Iterator[PlayedEpisode]:
    generator = np.random.default_rng(0)
    for _ in range(20):
        signs, phrases = np.zeros(6, dtype=int), []
        while len(phrases) < 40:
            signs[generator.integers(6)] = generator.integers(-1, 2)
            phrases += [format_phrase(Primitive(*signs.tolist()))] * int(generator.integers(1, 6))
        yield PlayedEpisode("put the spoon on the towel", tuple(phrases[:40]))
