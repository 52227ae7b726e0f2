"""Pictures that a prompt shows at every step cross the pipe to an engine's process once. No torch."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from vlm_local.types import GenerationRequest, Picture, ThoughtRequest

Request = TypeVar("Request", bound=GenerationRequest | ThoughtRequest)

MAX_BYTES = 1 << 28  # of pixels that each side keeps


@dataclass(frozen=True)
class _Name:
    """Stands for a picture that the other side has."""

    key: int


@dataclass(frozen=True)
class Piece:
    """Asks the other side for a piece of thinking. begins: what `pack` gave for a request; None goes on."""

    episode: str
    begins: tuple[list, list[Picture]] | None


class SentPictures:
    """What the other side knows. Both sides see the same messages in the same order, and so keep the same pictures."""

    def __init__(self, max_bytes: int = MAX_BYTES):
        self._max_bytes = max_bytes
        self._known: OrderedDict[int, Picture] = OrderedDict()  # the last used stands last

    def pack(self, requests: Sequence[Request]) -> tuple[list[Request], list[Picture]]:
        """Requests with names in place of pictures, and the pictures that the other side has not seen."""
        shown = {each.key: each for request in requests for each in request.prompt.pictures}
        new = [picture for key, picture in shown.items() if key not in self._known]
        packed = [
            _rewrite(each, lambda part: _Name(part.key) if isinstance(part, Picture) else part) for each in requests
        ]
        self._use(shown)
        return packed, new

    def unpack(self, packed: Sequence[Request], new: Sequence[Picture]) -> list[Request]:
        """The requests as they were before `pack`."""
        sent = {picture.key: picture for picture in new}
        names = [part.key for request in packed for part in request.prompt.earlier if isinstance(part, _Name)]
        shown = {key: sent.get(key) or self._known[key] for key in names}
        self._use(shown)
        return [_rewrite(each, lambda part: shown[part.key] if isinstance(part, _Name) else part) for each in packed]

    def _use(self, shown: dict[int, Picture]) -> None:
        for key, picture in shown.items():
            self._known.pop(key, None)
            self._known[key] = picture
        while sum(picture.pixels.nbytes for picture in self._known.values()) > self._max_bytes:
            self._known.popitem(last=False)


def _rewrite(request: Request, change) -> Request:
    if not request.prompt.earlier:
        return request
    earlier = tuple(map(change, request.prompt.earlier))
    return replace(request, prompt=replace(request.prompt, earlier=earlier))
