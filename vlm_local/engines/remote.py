"""One OpenAI-compatible server: how it takes constraints, what it answers, and how it fails."""

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from vlm_local.engines.chat_api import (
    DIALECTS,
    Completion,
    Dialect,
    build_messages,
    encode_image,
    read_completion,
    read_reason,
    shorten,
)
from vlm_local.engines.masses import Position, build_spelling, is_constrained, tells_end
from vlm_local.errors import ConfigError, RemoteError
from vlm_local.plain import hide_secrets
from vlm_local.types import Prompt

try:
    import openai
except ImportError:
    raise ConfigError(
        "--engine openai needs the openai package; install it with: .venv/bin/pip install -e '.[openai]'"
    ) from None

_CONNECT_S = 2.0
_LIST_S = 5.0  # for the list of models
_START_S = 60.0  # of the first question: kernels and tokenizers warm up behind it
_PROBE_TOKENS = 80
_FREE_TOKENS = 4  # fewer than a free answer has
# Kinds of failure behind which a field may be that the server need not know. Some refuse it with 500.
_PERHAPS_A_FIELD = ("refused", "server_error", "malformed")


class Options(NamedTuple):
    """Fields that servers may refuse. limit: the one that limits an answer's length, None for none.

    num_top: how many of the likeliest tokens it lists at each place; None for no log-probabilities.
    """

    limit: str | None
    num_top: int | None


_MOST_LISTED = 20  # vLLM's and OpenAI's largest; 5 is that of several hosted APIs. The plainest comes last.
_OPTIONS = tuple(
    Options(limit, top) for top in (_MOST_LISTED, 5, None) for limit in ("max_completion_tokens", "max_tokens")
)
_PLAINEST = Options(None, None)
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Reply:
    """sentence: one of those asked for. positions: empty where the server gives no log-probabilities."""

    sentence: str
    positions: tuple[Position, ...]


class Server:
    """A connection to one base URL. Its coroutines belong to one event loop."""

    def __init__(self, url: str, model: str):
        self.url = hide_secrets(url if "//" in url else f"http://{url}")
        self._model = model
        self._obeyed: Dialect | None = None
        self._options = _OPTIONS[0]
        self.constrained = False  # whether it gives log-probabilities, taken after the constraint
        self._tells_end = False
        self._may_close = False
        key = os.environ.get("OPENAI_API_KEY") or "none"  # servers of one's own ask for no key
        self._client = openai.AsyncOpenAI(base_url=build_base_url(url), api_key=key, max_retries=0)

    @property
    def dialect(self) -> str | None:
        return None if self._obeyed is None else self._obeyed.name

    @property
    def _dialect(self) -> Dialect:
        """The one that this server obeys; `connect` has found it."""
        assert self._obeyed is not None
        return self._obeyed

    @property
    def lacks_for_draws(self) -> str | None:
        """Why it can only be asked for its greedy answer, None where it can be drawn from."""
        if not self.constrained:
            return "gives no log-probabilities that were taken after the constraint"
        if (self._options.num_top or 0) < _MOST_LISTED:
            return f"lists only the {self._options.num_top} likeliest tokens, which is not all that can follow"
        if not (self._tells_end or self._dialect.json):
            return "gives no log-probability of an answer's end"
        return None

    async def connect(self, dialect: str | None = None) -> None:
        """Find the fields that the server takes, the dialect it obeys, and what its log-probabilities are.

        dialect: the only one to try. Raises RemoteError where the server cannot be asked,
        ConfigError where it answers but cannot be used.
        """
        await self._check_model()
        self._options = await self._find_options()
        reasons = []
        for candidate in DIALECTS:
            if dialect in (None, candidate.name):
                reason = await self._probe(candidate)
                if reason is None:
                    return
                reasons.append(f"{candidate.name}: {reason}")
        raise ConfigError(
            f"{self.url} does not keep to a list of allowed answers, so its model could say anything to the robot. "
            f"Tried {'; '.join(reasons)}. Serve the model with vLLM 0.12 or later, SGLang or llama.cpp's server, or "
            "with an API that enforces JSON schemas"
        )

    async def _check_model(self) -> None:
        try:
            with _translated(self.url, _LIST_S):
                ask = partial(self._client.models.list, timeout=self._limit(_LIST_S))
                page = await asyncio.wait_for(self._send(ask), _LIST_S)
        except RemoteError as error:
            if error.kind in ("connection", "timeout", "unauthorized"):
                raise
            return  # no list of models: the first question will tell
        names = [model.id for model in page.data or []]
        if names and self._model not in names:
            raise ConfigError(f"{self.url} serves no model {self._model!r}; --model can be {', '.join(names[:10])}")

    async def _find_options(self) -> Options:
        """The first of _OPTIONS that the server takes, by a question without constraint."""
        for options in _OPTIONS:
            try:
                answer = await self._post_free(options)
                break
            except RemoteError as error:
                is_last = options == _OPTIONS[-1]
                if error.kind not in _PERHAPS_A_FIELD or (is_last and error.kind == "server_error"):
                    raise
        else:
            return _OPTIONS[0]  # it may take questions with a constraint only
        older = options._replace(limit="max_tokens")
        if not _is_limited(answer) and older != options:
            # Older servers ignore the newer field, and cut answers where they like.
            with suppress(RemoteError):
                if _is_limited(await self._post_free(older)):
                    options = older
        if answer.positions and options.num_top:  # some list fewer than they were asked for
            num_listed = max(len(position.top) for position in answer.positions)
            options = options._replace(num_top=min(options.num_top, num_listed))
        return options

    async def _post_free(self, options: Options) -> Completion:
        return await self._post(_build_probe(), {}, _FREE_TOKENS, options, _START_S)

    async def _probe(self, dialect: Dialect) -> str | None:
        """Try a dialect with a word that only an obeying server can say: set it, or say why not."""
        word = "zq" + secrets.token_hex(4)
        try:
            answer, options = await self._post_probe(dialect.build([word]))
        except RemoteError as error:
            if error.kind not in _PERHAPS_A_FIELD:
                raise
            return str(error)
        if dialect.read(answer.text) != word or answer.finish != "stop":
            return f"said {shorten(answer.text)}, with finish_reason {answer.finish!r}"
        spelt = dialect.spell(word)
        self._obeyed, self._options = dialect, options
        self.constrained = answer.text == spelt and is_constrained(build_spelling((spelt,)), answer.positions)
        self._tells_end = tells_end(spelt.encode(), answer.positions)
        return None

    async def _post_probe(self, constraint: Mapping) -> tuple[Completion, Options]:
        """With all that the server takes; where it is refused without log-probabilities, then without any option."""
        for options in (self._options, self._options._replace(num_top=None)):
            try:
                return await self._post(_build_probe(), constraint, _PROBE_TOKENS, options, _START_S), options
            except RemoteError as error:
                if error.kind not in _PERHAPS_A_FIELD:
                    raise
        return await self._post(_build_probe(), constraint, _PROBE_TOKENS, _PLAINEST, _START_S), _PLAINEST

    def spell(self, sentence: str) -> str:
        """The text with which this server says a sentence."""
        return self._dialect.spell(sentence)

    async def warm_up(self, sentences: Sequence[str], timeout_s: float) -> None:
        """Have the server compile a list of sentences."""
        await self.ask(_build_probe(), sentences, timeout_s)

    async def ask(self, messages: list, sentences: Sequence[str], timeout_s: float, plain: bool = False) -> Reply:
        """Have the server say one of `sentences`. Raises RemoteError for everything else it does.

        plain: without any optional field, though the server has taken some.
        """
        longest = max(len(self._dialect.spell(sentence).encode()) for sentence in sentences)
        body = self._dialect.build(sentences)
        options = self._options if self.constrained else self._options._replace(num_top=None)
        options = _PLAINEST if plain else options
        answer = await self._post(messages, body, 2 * longest + 16, options, timeout_s)
        sentence = self._dialect.read(answer.text)
        if answer.finish != "stop":
            where = f"after {shorten(answer.text)}, with finish_reason {answer.finish!r}"
            raise RemoteError(f"{self.url} stopped in the middle of an answer, {where}", "truncated")
        if sentence is None or sentence not in sentences:
            raise RemoteError(f"{self.url} left the grammar and said {shorten(answer.text)}", "outside_grammar")
        exact = answer.text == self._dialect.spell(sentence)
        return Reply(sentence, answer.positions if exact else ())

    async def write(self, messages: list, max_tokens: int, timeout_s: float) -> Completion:
        """Free text. Raises RemoteError."""
        return await self._post(messages, {}, max_tokens, self._options._replace(num_top=None), timeout_s)

    async def _post(
        self, messages: list, constraint: Mapping, max_tokens: int, options: Options, timeout_s: float
    ) -> Completion:
        """One completion, whole within `timeout_s`."""
        fields = dict(constraint)
        if options.limit is not None:
            fields[options.limit] = max_tokens
        if options.num_top is not None:
            fields |= {"logprobs": True, "top_logprobs": options.num_top}
        with _translated(self.url, timeout_s):
            ask = partial(
                self._client.chat.completions.with_raw_response.create,
                model=self._model,
                messages=messages,
                temperature=0.0,
                extra_body=fields,
                timeout=self._limit(timeout_s),
            )
            response = await asyncio.wait_for(self._send(ask), timeout_s)  # the client's own limit is for each read
            return read_completion(response.content, options.num_top)

    async def _send(self, ask: Callable[[], Awaitable[_Answer]]) -> _Answer:
        """Uvicorn, below most of these servers, closes a connection after a 500 without saying so.

        What was sent into it is sent once more.
        """
        while True:
            try:
                return await ask()
            except openai.APIStatusError as error:
                self._may_close = error.status_code >= 500
                raise
            except openai.APIConnectionError as error:
                if not self._may_close or isinstance(error, openai.APITimeoutError):
                    raise
                self._may_close = False

    @staticmethod
    def _limit(timeout_s: float) -> openai.Timeout:
        return openai.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s))

    async def close(self) -> None:
        await self._client.close()


def build_base_url(url: str) -> str:
    """A server's URL with the API's path, /v1 where none is given."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--engine-url: expected URLs such as http://127.0.0.1:8001, got {hide_secrets(url)!r}")
    return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/") or "/v1", "", ""))


def _is_limited(answer: Completion) -> bool:
    """Whether the server ended a free answer at _FREE_TOKENS."""
    return answer.finish == "length" and (answer.num_tokens or 0) <= _FREE_TOKENS


def _build_probe() -> list:
    grey = np.full((64, 64, 3), 128, np.uint8)
    return build_messages(Prompt("Describe the picture.", "What colour is it?"), encode_image(grey))


@contextmanager
def _translated(url: str, timeout_s: float) -> Iterator[None]:
    """Turns what the openai package and its transport raise into a RemoteError of the right kind."""
    try:
        yield
    except (TimeoutError, openai.APITimeoutError):
        raise RemoteError(f"{url} gave no answer within {timeout_s:.3g} s", "timeout") from None
    except openai.APIStatusError as error:
        raise RemoteError(*_describe_status(url, error)) from None
    except openai.APIConnectionError as error:
        cause = error.__cause__ or error
        reason = str(cause) or type(cause).__name__  # a connection that is dropped has no words
        raise RemoteError(f"{url} cannot be reached ({reason}); is the server running?", "connection") from None
    except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise RemoteError(f"{url} answered what is no chat completion ({error!r})", "malformed") from None


def _describe_status(url: str, error: openai.APIStatusError) -> tuple[str, str]:
    status, reason = error.status_code, read_reason(error.body, error.response.text)
    if status in (401, 403):
        return f"{url} refuses the key ({status}); set OPENAI_API_KEY to one that it takes", "unauthorized"
    if status == 404:
        return f"{url} knows no such model or path ({reason}); see --model and --engine-url", "not_found"
    if status == 429:
        return f"{url} is at its rate limit or full (429: {reason})", "rate_limited"
    if status >= 500:
        return f"{url} failed with {status}: {reason}", "server_error"
    return f"{url} refused the request with {status}: {reason}", "refused"
