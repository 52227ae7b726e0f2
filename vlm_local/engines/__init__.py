"""Engines answer a request with one of its sentences: the Protocols that hf, openai, scripted and process fulfil.

Imports no torch; the module of each engine imports what it needs.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlm_local.errors import EngineError, VLMLocalError
from vlm_local.types import Generation, GenerationRequest, Thought, ThoughtRequest

logger = logging.getLogger(__name__)

Outcome = Generation | VLMLocalError


class Engine(Protocol):
    """Answers requests. One thread owns an engine and makes all calls.

    max_batch: the most requests that one call of `generate` takes.
    """

    max_batch: int

    def generate(self, requests: Sequence[GenerationRequest]) -> Sequence[Outcome]:
        """Answer 1 to `max_batch` requests; the result has one outcome for each, in the same order.

        The outcome of a request that fails alone is its error: RequestError where the request can never be
        answered, EngineError otherwise. Raises EngineError where the model failed for all; the caller then
        tries them again one by one.
        """
        ...

    def forget(self, episode: str) -> None:
        """Drop what is kept for this episode (KV, drafts)."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """model, family, checkpoint hash, device, dtype, quantize, trained, versions: JSON values."""
        ...

    def close(self) -> None:
        """Called by its owner when nothing will be asked any more; a second call changes nothing."""


@runtime_checkable
class ConcurrentEngine(Engine, Protocol):
    """An engine whose requests do not wait for each other: its owner need not collect them in batches."""

    def submit(self, request: GenerationRequest) -> "Future[Outcome]":
        """Begin to answer and return at once; any thread may call it. The engine keeps its own deadline."""
        ...


@runtime_checkable
class ThinkingEngine(Engine, Protocol):
    """An engine that writes free text in short pieces, so that a robot's request never waits longer than for one."""

    def think(self, episode: str, request: ThoughtRequest | GenerationRequest | None = None) -> str | Thought | None:
        """Do one piece of what an episode has begun.

        request: begins something in place of what was there: a thought to write, or a prompt whose part before the
        picture a later step will have, which is read and kept for it. None goes on.
        Returns the name of the piece that comes next, or at the end the Thought, None where a prompt was read.
        Raises EngineError where it failed or nothing is begun, RequestError for what cannot be read; either ends it.
        """
        ...


@runtime_checkable
class RemoteThinkingEngine(ConcurrentEngine, Protocol):
    """A ConcurrentEngine that sees by itself to it that no robot's request waits for a thought."""

    def submit_thought(self, request: ThoughtRequest) -> "Future[Thought]":
        """Begin to write and return at once; any thread may call it. `forget` cancels it."""
        ...


@contextmanager
def as_engine_error(what: str) -> Iterator[None]:
    """Log an exception of the block that is not an error of this package, and raise EngineError("`what`: ...")."""
    try:
        yield
    except VLMLocalError:
        raise
    except Exception as error:
        logger.exception("%s", what)
        raise EngineError(f"{what}: {type(error).__name__}: {error}") from error


def find_fault(generation: Generation, request: GenerationRequest) -> str | None:
    """Why an engine's answer is none, whatever engine it is."""
    if generation.sentence not in request.sentences:
        return f"the engine left the grammar and said {generation.sentence!r}"
    told = generation.probabilities
    if told is not None and not np.isfinite(told.sum()):
        return f"the engine said {generation.sentence!r} with probabilities that are not finite"
    return None
