"""What a model says to a blank picture: read once for an instruction and kept, for requests with a contrast."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.types import GenerationRequest

MAX_BLANKS = 64  # kept; 27 kB each for the 729 phrases
_GREY = 127  # of 255: near the mean that image processors subtract


class _BlankDecoder(Protocol):
    def read_blank(self, prepared: PreparedRequest) -> np.ndarray: ...


class BlankReadings:
    """Log-probabilities of a grammar's choices at a blank picture, by instruction; the least recently used go."""

    def __init__(self, prepare: Callable[[GenerationRequest], PreparedRequest], decoder: _BlankDecoder):
        self._prepare = prepare
        self._decoder = decoder
        self._kept: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def add_to(self, prepared: PreparedRequest) -> PreparedRequest:
        """The same with `blank_log`. Raises what preparing and reading the blank picture raise."""
        request = prepared.request
        key = request.sentences, request.blank, request.image.shape
        if key not in self._kept:
            self._kept[key] = self._decoder.read_blank(self._prepare(build_blank_request(request)))
            if len(self._kept) > MAX_BLANKS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return replace(prepared, blank_log=self._kept[key])


def build_blank_request(request: GenerationRequest) -> GenerationRequest:
    """The question whose answer a request with a contrast takes out: a grey picture of the same shape."""
    assert request.blank is not None  # see GenerationRequest
    image = np.full_like(request.image, _GREY)
    return GenerationRequest(image, request.blank, request.sentences, posterior="exact")
