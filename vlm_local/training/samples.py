"""Recorded episodes -> questions with their answers: a picture, a prompt, ECoT's phrase."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.errors import DataError
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.prompts import Template, build_prompt
from vlm_local.types import Episode, Observation, Prompt

_MAX_UNREADABLE = 100  # frames in a row: one is damaged, so many are a disk that is gone
HELD_OUT_EVERY = 20  # one of so many episodes is never trained on: 5 % tell when a model learns by heart


@dataclass(frozen=True, eq=False)
class Sample:
    """image: uint8 (H, W, 3). phrase: the right answer."""

    image: np.ndarray
    prompt: Prompt
    phrase: str


@dataclass(frozen=True, eq=False)
class _Labelled:
    """An episode with its phrases, one a step. Frames are not held: `load_image` reads them from the data set."""

    episode: Episode
    phrases: Sequence[str]


class RecordedSamples:
    """The labelled steps of episodes, in an order shuffled anew every epoch; frames are read when asked for.

    One in HELD_OUT_EVERY episodes is kept apart, for `draw_held_out` alone: see choose_held_out.
    """

    def __init__(
        self,
        episodes: Iterable[Episode],
        template: Template,
        history: int,
        seed: int,
        report: Callable[[DataError], None] = lambda error: None,
    ):
        """Uses steps with a full label window only: shorter ones act like a larger threshold.

        history: how many of the phrases before a step its prompt shows. report: is told once of each frame that
        cannot be read. Raises DataError where no step is left; episodes without an instruction or with a single step
        are passed over.
        """
        self._report = report
        self._unreadable: set[tuple[int, int]] = set()
        self._template = template
        self._history = history
        self._seed = seed
        self._episodes: list[_Labelled] = []
        self._epoch = -1
        self._shuffled = np.zeros(0, np.int64)  # the order of that epoch
        self.num_skipped = 0
        steps: list[np.ndarray] = []  # of each episode those that are asked
        digests: list[bytes] = []
        for episode in episodes:
            if len(episode) < 2 or not episode.instruction:
                self.num_skipped += 1
                continue
            labels, full = label_episode(episode.states)
            whole = np.flatnonzero(full).tolist()
            steps.append(np.array([step for step in whole if episode.instruction_at(step)], np.int32))
            digests.append(hashlib.sha256(_encode(episode)).digest())
            self._episodes.append(_Labelled(episode, [sys.intern(format_phrase(label)) for label in labels]))
        places = np.column_stack(
            [np.repeat(np.arange(len(steps)), [len(each) for each in steps]), np.concatenate([[], *steps])]
        ).astype(np.int32)
        is_held_out = np.isin(places[:, 0], choose_held_out(digests))
        self._places, self._held_out = places[~is_held_out], places[is_held_out]  # (N, 2): episode, step
        if not len(self._places):
            raise DataError(
                f"none of {len(self._episodes) + self.num_skipped} episodes has an instruction and four steps or more"
            )

    @property
    def num_episodes(self) -> int:
        """Those that the labelled steps are of."""
        return len(np.unique(self._places[:, 0]))

    @property
    def num_held_out(self) -> int:
        """Labelled steps that are kept apart."""
        return len(self._held_out)

    def __len__(self) -> int:
        return len(self._places)

    def draw(self, step: int, num_samples: int) -> list[Sample]:
        """The samples of training step `step`: always the same ones."""
        return [self._draw(place) for place in range(step * num_samples, (step + 1) * num_samples)]

    def _draw(self, place: int) -> Sample:
        """The sample at a place of all epochs' order; where its frame cannot be read, the one that follows it."""
        for following in range(place, place + _MAX_UNREADABLE):
            chosen = self._places[self._order(following // len(self))[following % len(self)]]
            sample = self._load(chosen)
            if sample is not None:
                return sample
        raise DataError(
            f"{_MAX_UNREADABLE} frames in a row cannot be read; mend the data, and the same command goes on"
        )

    def draw_held_out(self, num_samples: int) -> list[Sample]:
        """At most so many samples of the episodes that are kept apart, evenly spread: always the same ones."""
        chosen = np.linspace(0, len(self._held_out) - 1, min(num_samples, len(self._held_out))).astype(int)
        return [sample for index in chosen if (sample := self._load(self._held_out[index])) is not None]

    def _order(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            self._epoch = epoch
            self._shuffled = np.random.default_rng([self._seed, epoch]).permutation(len(self))
        return self._shuffled

    def _load(self, place: np.ndarray) -> Sample | None:
        """None where the frame cannot be read."""
        number, step = place.tolist()
        episode, phrases = self._episodes[number].episode, self._episodes[number].phrases
        state = episode.states[step].astype(float)
        try:
            image = episode.load_image(step)
        except DataError as error:
            if (number, step) not in self._unreadable:
                self._unreadable.add((number, step))
                self._report(error)
            return None
        instruction, first = episode.instruction_at(step), step
        while first > max(0, step - self._history) and episode.instruction_at(first - 1) == instruction:
            first -= 1  # not beyond: to a server a new instruction is a new episode
        observation, shown = Observation(image, instruction, state), phrases[first:step]
        return Sample(observation.image, build_prompt(self._template, observation, shown), phrases[step])


def choose_held_out(digests: Sequence[bytes]) -> list[int]:
    """Which episodes are never trained on, by the SHA-256 of each: those in the lowest of HELD_OUT_EVERY parts of its
    range, or the lowest where there is none; none of fewer than HELD_OUT_EVERY.

    So none that was trained on is held out later, where recordings are added or read in another order, and two copies
    of an episode are not on both sides.
    """
    shares = [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
    if len(set(shares)) < HELD_OUT_EVERY:
        return []
    limit = max(1 / HELD_OUT_EVERY, min(shares))
    return [number for number, share in enumerate(shares) if share <= limit]


def hash_episodes(episodes: Iterable[Episode], digest: "hashlib._Hash") -> Iterator[Episode]:
    """The same episodes; `digest` is fed with their words and states on the way."""
    for episode in episodes:
        digest.update(_encode(episode))
        yield episode


def _encode(episode: Episode) -> bytes:
    """Its words and states."""
    instructions = [episode.instruction_at(step) for step in range(len(episode))]
    words = json.dumps([episode.instruction, instructions]).encode()
    return words + np.ascontiguousarray(episode.states, np.float32).tobytes()
