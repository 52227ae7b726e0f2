"""Requests on their way through an engine's worker: where each caller waits, and how it is answered."""

import logging
from collections.abc import Mapping
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TypeVar

from vlm_local.engines import Engine, Outcome, find_fault
from vlm_local.errors import EngineError, VLMLocalError
from vlm_local.types import Generation, GenerationRequest

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


@dataclass(frozen=True, eq=False)
class Job:
    """One request, and where its caller waits for the answer. came: monotonic seconds."""

    request: GenerationRequest
    future: "Future[Generation]" = field(default_factory=Future)
    came: float = field(default_factory=monotonic)


def deliver(job: Job, outcome: Outcome, engine_ms: float) -> None:
    """Give a job's caller its answer, or why the engine's is none. engine_ms: that it took."""
    if isinstance(outcome, VLMLocalError):
        logger.warning("%s", outcome)
        settle(job.future, outcome)
    elif fault := find_fault(outcome, job.request):
        settle(job.future, EngineError(fault))
    else:
        settle(job.future, add_timings(outcome, {"engine": engine_ms}))


def forget(engine: Engine, episode: str) -> None:
    """Have an engine drop what it keeps of an episode; where that fails, the log says so."""
    try:
        engine.forget(episode)
    except Exception:
        logger.exception("the engine could not forget episode %s", episode)


def add_timings(generation: Generation, timings: Mapping[str, float]) -> Generation:
    return replace(generation, timings_ms={**generation.timings_ms, **timings})


def settle(future: "Future[Answer]", outcome: Answer | Exception) -> None:
    """Answer a future unless that was done meanwhile, as by the worker's end."""
    try:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
    except InvalidStateError:
        pass
