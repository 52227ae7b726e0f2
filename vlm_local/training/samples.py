"""Recorded episodes -> questions with their answers: a picture, a prompt, ECoT's phrase."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.errors import DataError
from vlm_local.primitives import format_phrase, label_episode
from vlm_local.prompts import Template, build_prompt
from vlm_local.types import Episode, Observation, Prompt


@dataclass(frozen=True, eq=False)
class Sample:
    """image: uint8 (H, W, 3). phrase: the right answer."""

    image: np.ndarray
    prompt: Prompt
    phrase: str


class RecordedSamples:
    """The labelled steps of episodes, in an order shuffled anew every epoch; frames are read when asked for."""

    def __init__(self, episodes: Iterable[Episode], template: Template, history: int, seed: int):
        """Uses steps with a full label window only: shorter ones act like a larger threshold.

        history: how many of the phrases before a step its prompt shows. Raises DataError where no
        step is left; episodes without an instruction or with a single step are passed over.
        """
        self._template = template
        self._history = history
        self._seed = seed
        self._steps: list[tuple[Episode, int, Sequence[str]]] = []
        self.num_episodes = self.num_skipped = 0
        for episode in episodes:
            if len(episode) < 2 or not episode.instruction:
                self.num_skipped += 1
                continue
            self.num_episodes += 1
            labels, full = label_episode(episode.states)
            phrases = [format_phrase(label) for label in labels]
            self._steps += [(episode, step, phrases) for step in range(len(episode)) if full[step]]
        if not self._steps:
            raise DataError(
                f"none of {self.num_episodes + self.num_skipped} episodes has an instruction and four steps or more"
            )

    def __len__(self) -> int:
        return len(self._steps)

    def draw(self, step: int, num_samples: int) -> list[Sample]:
        """The samples of training step `step`: always the same ones."""
        places = range(step * num_samples, (step + 1) * num_samples)
        return [self._load(self._order(place // len(self))[place % len(self)]) for place in places]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self))

    def _load(self, index: int) -> Sample:
        episode, step, phrases = self._steps[index]
        observation = Observation(episode.load_image(step), episode.instruction, episode.states[step].astype(float))
        shown = phrases[max(0, step - self._history) : step]
        return Sample(observation.image, build_prompt(self._template, observation, shown), phrases[step])
