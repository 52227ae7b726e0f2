"""Pictures on their way to an engine. What comes again at every step crosses the pipe to its process once. No torch."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from vlm_local.types import GenerationRequest, Picture, ThoughtRequest

MAX_PIXELS = 1280 * 28 * 28  # 1,280 image tokens on Qwen
MAX_BYTES = 1 << 28  # of earlier pictures' pixels that each side keeps
MAX_LISTS = 64  # of sentences: as many as a decoder keeps ready

Request = TypeVar("Request", bound=GenerationRequest | ThoughtRequest)


def scale_down(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same with at most MAX_PIXELS pixels; a second call changes nothing."""
    height, width = image.shape[:2]
    if height * width <= MAX_PIXELS:
        return image
    scale = (MAX_PIXELS / (height * width)) ** 0.5
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


@dataclass(frozen=True)
class _Name:
    """Stands for a picture that the other side has."""

    key: int


class Packed(NamedTuple, Generic[Request]):
    """Requests without what the other side has. lists: of each, the number of its sentences, None for a thought.

    new_pictures, new_lists: what the other side has not seen.
    """

    requests: list[Request]
    lists: list[int | None]
    new_pictures: list[Picture]
    new_lists: list[tuple[str, ...]]


@dataclass(frozen=True)
class Piece:
    """Asks the other side for a piece of thinking. begins: a request; None goes on."""

    episode: str
    begins: Packed | None


class SentParts:
    """Earlier pictures and lists of sentences that the other side knows.

    Both sides see the same messages in the same order, and so keep the same. A list of 729 phrases takes 36 kB and
    must be hashed where it is looked up: where it comes once, every request of a robot holds the same object.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self._max_bytes = max_bytes
        self._known: OrderedDict[int, Picture] = OrderedDict()  # the last used stands last
        self._lists: dict[tuple[str, ...], int] = {}  # of the side that packs: list -> its number
        self._numbered: list[tuple[str, ...]] = []  # of the side that unpacks

    def pack(self, requests: Sequence[Request]) -> Packed[Request]:
        """Names in place of earlier pictures and sentences, with what the other side has not seen."""
        shown = {each.key: each for request in requests for each in request.prompt.pictures}
        new = [picture for key, picture in shown.items() if key not in self._known]
        self._use(shown)
        given = [each.sentences if isinstance(each, GenerationRequest) else None for each in requests]
        new_lists = self._number([sentences for sentences in dict.fromkeys(given) if sentences is not None])
        numbers = [None if sentences is None else self._lists[sentences] for sentences in given]
        return Packed([_name_parts(each) for each in requests], numbers, new, new_lists)

    def _number(self, lists: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """Give each a number; returns those that are new to the other side, all where there were too many."""
        new = [sentences for sentences in lists if sentences not in self._lists]
        if len(self._lists) + len(new) > MAX_LISTS:
            self._lists.clear()
            new = lists
        self._lists.update({sentences: len(self._lists) + place for place, sentences in enumerate(new)})
        return new

    def unpack(self, packed: Packed[Request]) -> list[Request]:
        """The requests as they were before `pack`."""
        sent = {picture.key: picture for picture in packed.new_pictures}
        names = [part.key for each in packed.requests for part in each.prompt.earlier if isinstance(part, _Name)]
        shown = {key: sent.get(key) or self._known[key] for key in names}
        self._use(shown)
        if len(self._numbered) + len(packed.new_lists) > MAX_LISTS:  # as `_number` does
            self._numbered.clear()
        self._numbered += packed.new_lists
        return [
            _put_back(each, shown, None if number is None else self._numbered[number])
            for each, number in zip(packed.requests, packed.lists, strict=True)
        ]

    def _use(self, shown: dict[int, Picture]) -> None:
        for key, picture in shown.items():
            self._known.pop(key, None)
            self._known[key] = picture
        while sum(picture.pixels.nbytes for picture in self._known.values()) > self._max_bytes:
            self._known.popitem(last=False)


def _name_parts(request: Request) -> Request:
    earlier = tuple(_Name(part.key) if isinstance(part, Picture) else part for part in request.prompt.earlier)
    prompt = replace(request.prompt, earlier=earlier) if earlier else request.prompt
    changes = {"sentences": ()} if isinstance(request, GenerationRequest) else {}
    return replace(request, prompt=prompt, **changes)


def _put_back(request: Request, shown: dict[int, Picture], sentences: tuple[str, ...] | None) -> Request:
    earlier = tuple(shown[part.key] if isinstance(part, _Name) else part for part in request.prompt.earlier)
    prompt = replace(request.prompt, earlier=earlier) if earlier else request.prompt
    changes = {} if sentences is None else {"sentences": sentences}
    return replace(request, prompt=prompt, **changes)
