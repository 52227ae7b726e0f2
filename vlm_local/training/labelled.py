"""Labelled pictures -> what a success detector learns from: a picture, the served question, the right answer.

The split is by episode: frames of one recording are alike, so a detector that has seen some of them knows the others.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance

from vlm_local.answers import complete_question
from vlm_local.data.images import squeeze
from vlm_local.data.questions import LabelledImage
from vlm_local.errors import DataError
from vlm_local.prompts import Template, build_prompt
from vlm_local.training.samples import Sample
from vlm_local.types import Observation

SIDE = 256  # pixels of the square pictures that a station shows its detector, and of those learnt from
HELD_OUT_SHARE = 0.05  # of each answer's episodes, one at least where it has two

_CROP, _JITTER = 240, 0.1  # AutoEval's, of pixels, and of brightness, contrast, saturation and hue
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@dataclass(frozen=True, eq=False)
class Split:
    """Pictures that are learnt from and pictures that are kept apart. sha256: of all, with their answers."""

    learnt: list[LabelledImage]
    held_out: list[LabelledImage]
    sha256: str


def split_by_episode(images: Iterable[LabelledImage]) -> Split:
    """The same pictures give the same split: an episode's place is the SHA-256 of its name.

    Pictures become squares of SIDE pixels. Raises DataError where there are none, or all have one answer.
    """
    digest = hashlib.sha256()
    episodes: dict[str, list[LabelledImage]] = {}
    for each in images:
        square = replace(each, image=squeeze(each.image, SIDE))
        digest.update(f"{each.episode}\n{each.answer}\n".encode() + square.image.tobytes())
        episodes.setdefault(each.episode, []).append(square)
    by_answer: dict[str, list[str]] = {}
    for name, pictures in episodes.items():
        by_answer.setdefault(pictures[0].answer, []).append(name)
    if len(by_answer) < 2:
        raise DataError(
            f"pictures with two answers at least were expected, these have {', '.join(by_answer) or 'none'}"
        )
    apart: set[str] = set()
    for names in by_answer.values():
        names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
        apart.update(names[: max(1, round(HELD_OUT_SHARE * len(names)))] if len(names) > 1 else [])
    learnt = [each for name, pictures in episodes.items() if name not in apart for each in pictures]
    held_out = [each for name, pictures in episodes.items() if name in apart for each in pictures]
    return Split(learnt, held_out, digest.hexdigest())


class LabelledSamples:
    """The pictures of a split, in an order shuffled anew every epoch, changed a little each time they are drawn."""

    def __init__(self, split: Split, question: str, choices: Sequence[str], template: Template, seed: int):
        """template: the one that the served model shows questions in."""
        observation = Observation(np.zeros((SIDE, SIDE, 3), np.uint8), complete_question(question, choices))
        self._prompt = build_prompt(template, observation)
        self._split, self._seed = split, seed

    @property
    def num_episodes(self) -> int:
        return len({each.episode for each in self._split.learnt})

    def __len__(self) -> int:
        return len(self._split.learnt)

    def draw(self, step: int, num_samples: int) -> list[Sample]:
        """The samples of training step `step`: always the same ones."""
        return [self._draw(place) for place in range(step * num_samples, (step + 1) * num_samples)]

    def draw_held_out(self, num_samples: int) -> list[Sample]:
        """At most so many of the pictures that are kept apart, evenly spread, as they are."""
        pictures = self._split.held_out
        chosen = np.linspace(0, len(pictures) - 1, min(num_samples, len(pictures))).astype(int)
        return [Sample(pictures[index].image, self._prompt, pictures[index].answer) for index in chosen]

    def _draw(self, place: int) -> Sample:
        epoch, index = divmod(place, len(self))
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self))
        each = self._split.learnt[order[index]]
        return Sample(change(each.image, np.random.default_rng([self._seed, 1, place])), self._prompt, each.answer)


def change(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """AutoEval's augmentation of a square picture: other colours, in any order of changes, and a part of it.

    uint8 (SIDE, SIDE, 3) -> uint8 (240, 240, 3). Theirs is torchvision's ColorJitter and RandomCrop, and changes the
    data themselves, so that an epoch's changes come on top of all before; here each starts from the picture.
    """
    picture = Image.fromarray(image)
    for number in rng.permutation(len(_ENHANCERS) + 1):
        if number < len(_ENHANCERS):
            picture = _ENHANCERS[number](picture).enhance(rng.uniform(1 - _JITTER, 1 + _JITTER))
        else:
            picture = _turn_hue(picture, rng.uniform(-_JITTER, _JITTER))
    top, left = rng.integers(SIDE - _CROP + 1, size=2)
    return np.asarray(picture)[top : top + _CROP, left : left + _CROP]


def _turn_hue(picture: Image.Image, share: float) -> Image.Image:
    """share: of the whole circle."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = np.asarray(hue).astype(np.int16) + round(255 * share)
    return Image.merge("HSV", (Image.fromarray((turned % 256).astype(np.uint8)), saturation, value)).convert("RGB")
