"""Engines answer a request with one of its sentences: the Protocols that hf, openai, scripted and process fulfil, what
no model is given (large pictures, control tokens), and how an answer, or a failure, reaches the one who asked.

Imports no torch; the module of each engine imports what it needs.
"""

import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from time import monotonic
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from vlm_local.errors import EngineError, RequestError, VLMLocalError
from vlm_local.types import Generation, GenerationRequest, Thought, ThoughtRequest

logger = logging.getLogger(__name__)

Outcome = Generation | VLMLocalError
Answer = TypeVar("Answer")

OTHERS_WAIT_S = 1.0  # for robots that leave no forward free
MAX_PIXELS = 1280 * 28 * 28  # of a picture: 1,280 image tokens on Qwen

# Innermost first, of both kinds: taking <b> out of <|<b>|> may leave a token, which the next pass finds.
_MARKED = re.compile(r"<[^<>\[\]]*>|\[[^<>\[\]]*\]")
# What tokens look like where the tokenizer is not known: <|im_end|>, </s>, <start_of_turn>, [INST];
# DeepSeek writes a wide bar (U+FF5C).
_LOOKS_LIKE_ONE = re.compile(r"<[|\uff5c/]*[\w▁.-]+[|\uff5c/]*>|\[/?[A-Z][A-Z_]+\]")
_MAX_CHECKED = 64
_PLACEHOLDER = re.compile(r"image|img|vision|video", re.IGNORECASE)


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


def scale_down(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> the same with at most MAX_PIXELS pixels; a second call changes nothing."""
    height, width = image.shape[:2]
    if height * width <= MAX_PIXELS:
        return image
    scale = (MAX_PIXELS / (height * width)) ** 0.5
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


class ControlTokenFilter:
    """Turns control tokens into plain words, however they are nested: <|<|im_end|>|> becomes im_end."""

    def __init__(self, tokens: Collection[str] | None):
        """tokens: of the model's tokenizer; None where it is not known: then whatever looks like one."""
        self._tokens = None if tokens is None else frozenset(tokens)
        # Those that _MARKED does not find, also within brackets; one that is only space or a single letter is no mark.
        bare = [re.escape(token) for token in tokens or () if len(token.strip()) > 1 and not _MARKED.fullmatch(token)]
        names = "|".join(sorted(bare, key=len, reverse=True))
        self._patterns = (re.compile(names or "(?!)"), _MARKED)
        self.check_sentences = lru_cache(_MAX_CHECKED)(self._check_sentences)  # robots ask for the same list each step

    def __call__(self, text: str) -> str:
        """Raises RequestError for a placeholder of a picture: where it stands, the model would look for one."""
        while (plain := self._take_apart(text)) != text:
            text = plain
        return text

    def _take_apart(self, text: str) -> str:
        for pattern in self._patterns:
            text = pattern.sub(self._make_plain, text)
        return text

    def _check_sentences(self, sentences: tuple[str, ...]) -> None:
        """Raises RequestError where what may be answered holds a control token."""
        for sentence in sentences:
            found = (match[0] for pattern in self._patterns for match in pattern.finditer(sentence))
            if any(map(self._is_token, found)):
                raise RequestError(f"{sentence!r} holds a control token of the model and cannot be answered")

    def _is_token(self, word: str) -> bool:
        known = _LOOKS_LIKE_ONE.fullmatch(word) if self._tokens is None else word in self._tokens
        return bool(known)

    def _make_plain(self, match: re.Match) -> str:
        word = match[0]
        if not self._is_token(word):
            return word
        if _PLACEHOLDER.search(word):
            raise RequestError(f"the words hold {word!r}, which stands for a picture in a prompt; leave it out")
        plain = word.strip("<|\uff5c>[]")
        return plain if plain != word else ""


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


@dataclass(frozen=True, eq=False)
class Job:
    """One request, and where its caller waits for the answer. came: monotonic seconds."""

    request: GenerationRequest
    future: "Future[Generation]" = field(default_factory=Future)
    came: float = field(default_factory=monotonic)


def choose_next(waiting: Sequence[Job], max_batch: int) -> list[Job]:
    """Of the jobs, oldest first, those of robots, unless there is none or another one has waited too long."""
    robots = [job for job in waiting if job.request.episode is not None]
    others = [job for job in waiting if job.request.episode is None]
    is_late = others and monotonic() - others[0].came > OTHERS_WAIT_S
    return (others if is_late or not robots else robots)[:max_batch]


def deliver(job: Job, outcome: Outcome, engine_ms: float) -> None:
    """Give a job's caller its answer, or why the engine's is none. engine_ms: that it took.

    It is the one place where an answer is held against the grammar, whatever engine gave it.
    """
    if isinstance(outcome, VLMLocalError):
        logger.warning("%s", outcome)
        settle(job.future, outcome)
    elif fault := _find_fault(outcome, job.request):
        settle(job.future, EngineError(fault))
    else:
        settle(job.future, add_timings(outcome, {"engine": engine_ms}))


def fail(job: Job, error: Exception) -> None:
    """Called while `error`, which the engine raised, is handled."""
    logger.exception("the model failed")
    name = type(error).__name__
    settle(job.future, error if isinstance(error, EngineError) else EngineError(f"the model failed: {name}: {error}"))


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


def _find_fault(generation: Generation, request: GenerationRequest) -> str | None:
    if generation.sentence not in request.sentences:
        return f"the engine left the grammar and said {generation.sentence!r}"
    told = generation.probabilities
    if told is not None and not np.isfinite(told.sum()):
        return f"the engine said {generation.sentence!r} with probabilities that are not finite"
    return None
