"""One OpenAI-compatible server: how it takes constraints, what it answers, and how it fails."""

import asyncio
import base64
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image

from vlm_local.engines.dialects import DIALECTS, Dialect
from vlm_local.engines.masses import Position, Token, build_spelling, is_constrained
from vlm_local.errors import ConfigError, RemoteError
from vlm_local.plain import hide_secrets
from vlm_local.types import Prompt

try:
    import openai
except ImportError:
    raise ConfigError(
        "--engine openai needs the openai package; install it with: pip install 'vlm-local[openai]'"
    ) from None

_CONNECT_S = 2.0
_START_S = 60.0  # of the first question: kernels and tokenizers warm up behind it
_PROBE_TOKENS = 80
_NUM_TOP = 20  # vLLM's and OpenAI's largest


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
        self._dialect: Dialect | None = None
        self.constrained = False  # whether it gives log-probabilities, taken after the constraint
        key = os.environ.get("OPENAI_API_KEY") or "none"  # servers of one's own ask for no key
        self._client = openai.AsyncOpenAI(base_url=build_base_url(url), api_key=key, max_retries=0)

    @property
    def dialect(self) -> str | None:
        return self._dialect.name if self._dialect else None

    async def connect(self, dialect: str | None = None) -> None:
        """Find the dialect that the server obeys, and what its log-probabilities are.

        dialect: the only one to try. Raises RemoteError where the server cannot be asked,
        ConfigError where it answers but cannot be used.
        """
        await self._check_model()
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
            with _translated(self.url, _CONNECT_S + 3):
                page = await self._client.models.list(timeout=self._limit(_CONNECT_S + 3))
        except RemoteError as error:
            if error.kind in ("connection", "timeout", "server_error", "unauthorized"):
                raise
            return  # no list of models: the first question will tell
        names = [model.id for model in page.data or []]
        if names and self._model not in names:
            raise ConfigError(f"{self.url} serves no model {self._model!r}; --model can be {', '.join(names[:10])}")

    async def _probe(self, dialect: Dialect) -> str | None:
        """Try a dialect with a word that only an obeying server can say: set it, or say why not."""
        word = "zq" + secrets.token_hex(4)
        try:
            answer = await self._post_probe(dialect.build([word]))
        except RemoteError as error:
            if error.kind not in ("refused", "server_error", "malformed"):
                raise
            return str(error)
        if dialect.read(answer["text"]) != word or answer["finish"] != "stop":
            return f"said {_shorten(answer['text'])}"
        spelt = dialect.spell(word)
        self._dialect = dialect
        self.constrained = answer["text"] == spelt and is_constrained(build_spelling((spelt,)), answer["positions"])
        return None

    async def _post_probe(self, constraint: Mapping) -> dict[str, Any]:
        """With log-probabilities, or without them where they are what the server refuses."""
        try:
            return await self._post(_build_probe(), constraint, _PROBE_TOKENS, True, _START_S)
        except RemoteError as error:
            if error.kind != "refused":
                raise
        return await self._post(_build_probe(), constraint, _PROBE_TOKENS, False, _START_S)

    def spell(self, sentence: str) -> str:
        """The text with which this server says a sentence."""
        return self._dialect.spell(sentence)

    async def warm_up(self, sentences: Sequence[str], timeout_s: float) -> None:
        """Have the server compile a list of sentences."""
        await self.ask(_build_probe(), sentences, timeout_s)

    async def ask(self, messages: list, sentences: Sequence[str], timeout_s: float) -> Reply:
        """Have the server say one of `sentences`. Raises RemoteError for everything else it does."""
        longest = max(len(self._dialect.spell(sentence).encode()) for sentence in sentences)
        body = self._dialect.build(sentences)
        answer = await self._post(messages, body, 2 * longest + 16, self.constrained, timeout_s)
        sentence = self._dialect.read(answer["text"])
        if answer["finish"] != "stop":
            where = f"after {_shorten(answer['text'])}, with finish_reason {answer['finish']!r}"
            raise RemoteError(f"{self.url} stopped in the middle of an answer, {where}", "truncated")
        if sentence not in sentences:
            raise RemoteError(f"{self.url} left the grammar and said {_shorten(answer['text'])}", "outside_grammar")
        exact = answer["text"] == self._dialect.spell(sentence)
        return Reply(sentence, tuple(answer["positions"]) if exact else ())

    async def _post(self, messages: list, constraint: Mapping, max_tokens: int, logprobs: bool, timeout_s: float):
        """One completion -> {"text", "finish", "positions"}."""
        options = {"logprobs": True, "top_logprobs": _NUM_TOP} if logprobs else {}
        with _translated(self.url, timeout_s):
            response = await self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=messages,
                temperature=0.0,
                max_completion_tokens=max_tokens,
                extra_body=dict(constraint),
                timeout=self._limit(timeout_s),
                **options,
            )
            return _read_completion(response.content)

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


def encode_image(image: np.ndarray) -> str:
    """uint8 (H, W, 3) RGB -> a PNG data URL: lossless, so that the server sees what we saw."""
    file = BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def build_messages(prompt: Prompt, image_url: str) -> list:
    """The prompt around the image; what stays the same comes first, for the server's prefix cache."""
    content = [
        {"type": "text", "text": prompt.before + "\n"},
        {"type": "image_url", "image_url": {"url": image_url}},
        {"type": "text", "text": "\n" + prompt.after},
    ]
    return [{"role": "user", "content": content if prompt.before else content[1:]}]


def _build_probe() -> list:
    grey = np.full((64, 64, 3), 128, np.uint8)
    return build_messages(Prompt("Describe the picture.", "What colour is it?", "probe"), encode_image(grey))


def _read_completion(body: bytes) -> dict[str, Any]:
    choice = json.loads(body)["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    return {
        "text": choice["message"]["content"] or "",
        "finish": choice["finish_reason"],
        "positions": [_read_position(entry) for entry in entries],
    }


def _read_position(entry: Mapping) -> Position:
    said = _read_token(entry)
    top = dict.fromkeys([said, *(_read_token(other) for other in entry.get("top_logprobs") or [])])
    return Position(said, tuple(top))


def _read_token(entry: Mapping) -> Token:
    text = bytes(entry["bytes"]) if entry.get("bytes") is not None else entry["token"].encode()
    return Token(text, float(entry["logprob"]))


@contextmanager
def _translated(url: str, timeout_s: float) -> Iterator[None]:
    """Turns what the openai package and its transport raise into a RemoteError of the right kind."""
    try:
        yield
    except (openai.APITimeoutError, asyncio.TimeoutError):
        raise RemoteError(f"{url} gave no answer within {timeout_s:.3g} s", "timeout") from None
    except openai.APIStatusError as error:
        raise RemoteError(*_describe_status(url, error)) from None
    except openai.APIConnectionError as error:
        reason = error.__cause__ or error
        raise RemoteError(f"{url} cannot be reached ({reason}); is the server running?", "connection") from None
    except (openai.OpenAIError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RemoteError(f"{url} answered what is no chat completion ({error!r})", "malformed") from None


def _describe_status(url: str, error: openai.APIStatusError) -> tuple[str, str]:
    status, reason = error.status_code, _shorten(error.message)
    if status in (401, 403):
        return f"{url} refuses the key ({status}); set OPENAI_API_KEY to one that it takes", "unauthorized"
    if status == 404:
        return f"{url} knows no such model or path ({reason}); see --model and --engine-url", "not_found"
    if status == 429:
        return f"{url} is at its rate limit or full (429: {reason})", "rate_limited"
    if status >= 500:
        return f"{url} failed with {status}: {reason}", "server_error"
    return f"{url} refused the request with {status}: {reason}", "refused"


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
