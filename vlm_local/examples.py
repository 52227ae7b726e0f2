"""Steps of recorded episodes that a prompt shows as examples: which of them, and never one of the episode at hand."""

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.data import Selection, open_data_set
from vlm_local.data.hub import parse_repository
from vlm_local.embodiments import AUTO
from vlm_local.engines import scale_down
from vlm_local.errors import ConfigError, DataError
from vlm_local.files import read_json_object, write_json
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.prompts import Example
from vlm_local.types import Episode, Generation, GenerationRequest, Observation, Picture, Prompt

CHOICES = ("fixed", "nearest")
DEFAULT_COUNT = 8
MAX_COUNT = 64
MAX_EPISODES = 64  # of a data set that examples are taken from, the first: their frames are compared with what is seen

Generate = Callable[[GenerationRequest], Generation]
_SELECTED = ("camera", "split", "state_layout")  # of a file of examples, as data.Selection has them
_NOTHING = ("stop",)  # a single sentence: a model is asked nothing but to look


@dataclass(frozen=True, eq=False)
class _Source:
    """An episode that examples can be taken from.

    phrases: step -> its label, of the steps that can be shown. seen: keys of all its frames.
    """

    episode: Episode
    phrases: Mapping[int, str]
    seen: frozenset[int]


@dataclass(frozen=True, eq=False)
class _Place:
    """A step of a source that can be shown."""

    source: _Source
    step: int


class ExampleSet:
    """The episodes of one data set, and the choice among their steps. Any thread may use it."""

    def __init__(self, data: str, num: int, choice: str, sources: Sequence[_Source]):
        """num: examples in a prompt. choice: "fixed" or "nearest", see `choose`."""
        self._data, self.num, self._choice = data, num, choice
        self._sources = list(sources)
        self._features: np.ndarray | None = None  # (sources, n), of unit length
        self._shown: dict[tuple[int, int], Example] = {}
        self._lock = threading.Lock()

    @property
    def metadata(self) -> dict[str, Any]:
        """data, num, choice, episodes (to choose from); with choice "fixed" also what is shown."""
        told = {"data": self._data, "num": self.num, "choice": self._choice, "episodes": len(self._sources)}
        if self._choice == "fixed":
            told["shown"] = [{"source": each.source, "phrase": each.phrase} for each in self._pick(self._sources)]
        return told

    def choose(self, observation: Observation, generate: Generate, episode: str | None = None) -> tuple[Example, ...]:
        """Up to `num` examples for the episode that begins with `observation`, balanced over phrases.

        Episodes that hold the observed picture are left out: one of them is the present episode. fixed: from all others
        in reading order. nearest: from the `num` whose instruction and first frame are most like the present ones.
        generate: asks the engine for image features. episode: key of the present one. Raises EngineError.
        """
        if observation.unmarked is not None:  # the sources have no marks: neither alike nor the same otherwise
            observation = replace(observation, image=observation.unmarked)
        seen = Picture(observation.image).key
        others = [source for source in self._sources if seen not in source.seen]
        if self._choice == "nearest":
            others = self._sort(others, observation, generate, episode)[: self.num]
        return tuple(self._pick(others))

    def _pick(self, sources: Sequence[_Source]) -> list[Example]:
        with self._lock:
            return [self._load(place) for place in balance(sources, self.num)]

    def _load(self, place: _Place) -> Example:
        episode, step = place.source.episode, place.step
        key = episode.index, step
        if key not in self._shown:
            picture = Picture(scale_down(episode.load_image(step)))
            state, phrase = episode.states[step].astype(np.float64), place.source.phrases[step]
            source = f"episode {episode.index}, step {step}"
            self._shown[key] = Example(picture, episode.instruction_at(step), state, phrase, source)
        return self._shown[key]

    def _sort(
        self, sources: Sequence[_Source], observation: Observation, generate: Generate, episode: str | None
    ) -> list[_Source]:
        """Most alike first: shared words of the instructions plus cosine of the images' mean features."""
        with self._lock:
            if self._features is None:
                firsts = [source.episode.load_image(0) for source in self._sources]
                self._features = np.stack([_look(scale_down(image), generate, None) for image in firsts])
            rows = {id(source): row for source, row in zip(self._sources, self._features, strict=True)}
        seen, words = _look(observation.image, generate, episode), _list_words(observation.instruction)
        likeness = [
            float(rows[id(source)] @ seen) + _compare(words, _list_words(source.episode.instruction))
            for source in sources
        ]
        return [sources[index] for index in np.argsort(np.negative(likeness), kind="stable")]


def load_examples(text: str, choice: str, phrases: Collection[str], embodiment: str = AUTO) -> ExampleSet:
    """text: "DATA" or "DATA:N". DATA is a data set of any known format, or a JSON file that names one and some of its
    episodes, see `write_example_file`. phrases: that may be shown, a grammar's.

    Raises ConfigError where no step can be shown, DataError for a path that is no data set.
    """
    if choice not in CHOICES:
        raise ConfigError(f"--example-choice must be one of {', '.join(CHOICES)}, not {choice!r}")
    path, num = parse_examples(text)
    data, selection, numbers = _read_example_file(Path(path)) if path.endswith(".json") else (path, Selection(), None)
    episodes = open_data_set(data, replace(selection, embodiment=embodiment), lambda problem: None).episodes
    allowed = (episode for episode in episodes if numbers is None or episode.index in numbers)
    sources = list(_list_sources(islice(allowed, MAX_EPISODES), frozenset(phrases)))
    if not sources:
        raise ConfigError(
            f"--examples {path}: no step has an instruction, a picture and a label that the grammar allows"
        )
    return ExampleSet(path, num, choice, sources)


def parse_examples(text: str) -> tuple[str, int]:
    """ "DATA" or "DATA:N" -> path and number. Raises ConfigError for a number out of range."""
    match = re.fullmatch(r"(.+):(\d+)", text)
    path, num = (match[1], int(match[2])) if match else (text, DEFAULT_COUNT)
    if not 1 <= num <= MAX_COUNT:
        raise ConfigError(f"--examples {text}: expected DATA:N with N from 1 to {MAX_COUNT}")
    return path, num


def write_example_file(path: Path, data: str, selection: Selection, numbers: Sequence[int]) -> None:
    """A file for `load_examples`: episodes of a data set by their numbers in the reading order of `selection`."""
    told = {name: getattr(selection, name) for name in _SELECTED}
    is_local = parse_repository(data) is None
    write_json(path, {"data": str(Path(data).resolve()) if is_local else data, **told, "episodes": list(numbers)})


def _read_example_file(path: Path) -> tuple[str, Selection, frozenset[int]]:
    try:
        told = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--examples {path} cannot be read: {error}") from None
    numbers, texts = told.get("episodes"), [told.get(name) for name in _SELECTED]
    are_numbers = isinstance(numbers, list) and all(type(number) is int for number in numbers)
    are_texts = isinstance(told.get("data"), str) and all(text is None or isinstance(text, str) for text in texts)
    if not are_numbers or not are_texts:
        raise ConfigError(f"--examples {path}: expected 'data', a path, and 'episodes', a list of whole numbers")
    return told["data"], Selection(**dict(zip(_SELECTED, texts, strict=True))), frozenset(numbers or ())


def _list_sources(episodes: Iterator[Episode], allowed: frozenset[str]) -> Iterator[_Source]:
    for episode in episodes:
        try:
            labels, full_windows = label_episode(episode.states)
            seen = frozenset(Picture(episode.load_image(step)).key for step in range(len(episode)))
        except DataError:
            continue
        phrases = {
            step: phrase
            for step, phrase in enumerate(map(format_phrase, labels))
            if full_windows[step] and phrase in allowed and episode.instruction_at(step)
        }
        if phrases:
            yield _Source(episode, phrases, seen)


def balance(sources: Sequence[_Source], num: int) -> list[_Place]:
    """Up to `num` steps: of each phrase, the most frequent first, one, then of each another; each time from the
    episode that was used least.
    """
    places = defaultdict(list)
    for source in sources:
        for step, phrase in source.phrases.items():
            places[phrase].append(_Place(source, step))
    order = sorted(places, key=lambda phrase: -len(places[phrase]))  # as first met, where as frequent
    chosen: list[_Place] = []
    used: Counter[int] = Counter()
    while len(chosen) < num and any(places.values()):
        for phrase in order:
            if places[phrase] and len(chosen) < num:
                place = min(places[phrase], key=lambda each: used[each.source.episode.index])
                places[phrase].remove(place)
                used[place.source.episode.index] += 1
                chosen.append(place)
    return chosen


def _look(image: np.ndarray, generate: Generate, episode: str | None) -> np.ndarray:
    """The model's features of a picture, float32 (n,) of unit length."""
    request = GenerationRequest(image, Prompt("", ""), _NOTHING, episode, posterior="off", wants_features=True)
    features = generate(request).features
    if features is None:
        raise ConfigError("--example-choice nearest: this engine gives no image features; use fixed")
    return features / max(float(np.linalg.norm(features)), 1e-12)


def _list_words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def _compare(first: set[str], second: set[str]) -> float:
    """Jaccard's index, 0 to 1."""
    return len(first & second) / max(len(first | second), 1)
