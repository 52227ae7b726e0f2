"""What goes to an OpenAI-compatible API and what comes back, without the network: a prompt with its pictures, how a
server is told to say one of given sentences, and what its answer says (text, end, log-probabilities) or why it refused.

Unknown fields are ignored by all of them with status 200, so a dialect counts for nothing until the
server has obeyed it.
"""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vlm_local.data.images import encode_file
from vlm_local.engines.masses import Position, Token
from vlm_local.types import Picture, Prompt

_NEVER = -9999.0  # what OpenAI and vLLM write for a token that has no chance
_ABOVE_ZERO = 0.01  # a logarithm rounded in 16 bits may be this far above 0

_REGEX_SPECIAL = re.compile(r"[\\.^$*+?{}\[\]|()]")


@dataclass(frozen=True)
class Dialect:
    """build: sentences -> the fields to add to the request's body. json: answers come as JSON."""

    name: str
    build: Callable[[Sequence[str]], dict[str, Any]]
    json: bool = False

    def spell(self, sentence: str) -> str:
        """The whole text with which a server says this sentence, as far as the server chooses none of it."""
        return json.dumps({"answer": sentence}, separators=(",", ":"), ensure_ascii=False) if self.json else sentence

    def read(self, text: str) -> str | None:
        """What a server's text says, None where it is not even an answer."""
        if not self.json:
            return text
        try:
            value = json.loads(text)
        except ValueError:
            return None
        return value.get("answer") if isinstance(value, dict) and len(value) == 1 else None


def _write_regex(sentences: Sequence[str]) -> str:
    return "(" + "|".join(_REGEX_SPECIAL.sub(r"\\\g<0>", sentence) for sentence in sentences) + ")"


def _write_grammar(sentences: Sequence[str]) -> str:
    """The EBNF that llama.cpp, xgrammar and SGLang share; a quoted string is spelt as in JSON."""
    return "root ::= " + " | ".join(json.dumps(sentence, ensure_ascii=False) for sentence in sentences)


def _write_schema(sentences: Sequence[str]) -> dict[str, Any]:
    answer = {"type": "string", "enum": list(sentences)}
    return {
        "type": "object",
        "properties": {"answer": answer},
        "required": ["answer"],
        "additionalProperties": False,
    }


def _write_response_format(sentences: Sequence[str]) -> dict[str, Any]:
    schema = {"name": "answer", "strict": True, "schema": _write_schema(sentences)}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def _structured(kind: str, write: Callable[[Sequence[str]], Any]) -> Callable[[Sequence[str]], dict[str, Any]]:
    return lambda sentences: {"structured_outputs": {kind: write(sentences)}}


# In the order they are tried: exact text before JSON, whose free spaces cost tokens and
# probabilities.
DIALECTS = (
    Dialect("vllm-choice", _structured("choice", list)),
    Dialect("vllm-regex", _structured("regex", _write_regex)),
    Dialect("vllm-grammar", _structured("grammar", _write_grammar)),
    Dialect("sglang-regex", lambda sentences: {"regex": _write_regex(sentences)}),
    Dialect("sglang-ebnf", lambda sentences: {"ebnf": _write_grammar(sentences)}),
    Dialect("llama-grammar", lambda sentences: {"grammar": _write_grammar(sentences)}),
    Dialect("vllm-json", _structured("json", _write_schema), json=True),
    Dialect("json-schema", _write_response_format, json=True),
)


def encode_image(image: np.ndarray) -> str:
    """uint8 (H, W, 3) RGB -> a PNG data URL: lossless, so that the server sees what we saw."""
    return "data:image/png;base64," + base64.b64encode(encode_file(image, "PNG", compress_level=1)).decode("ascii")


@lru_cache(64)
def _encode_picture(picture: Picture) -> str:
    """As `encode_image`, of a picture that a prompt shows at every step."""
    return encode_image(picture.pixels)


def build_messages(prompt: Prompt, image_url: str) -> list:
    """The prompt around the image; what stays the same comes first, for the server's prefix cache."""
    return [{"role": "user", "content": [_write_part(part, image_url) for part in prompt.list_parts()]}]


def _write_part(part: str | Picture | None, present_url: str) -> dict:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": present_url if part is None else _encode_picture(part)}}


@dataclass(frozen=True)
class Completion:
    """finish: the server's finish_reason. num_tokens: how many it counted, None where it does not say.

    positions: empty where it gave no log-probabilities that can be read.
    """

    text: str
    finish: str | None
    num_tokens: int | None
    positions: tuple[Position, ...]


def read_completion(body: bytes, num_top: int | None) -> Completion:
    """A chat completion's JSON. num_top: how many tokens the server lists at each place.

    Raises ValueError, LookupError, TypeError, AttributeError or RecursionError where it is none.
    """
    answer = json.loads(body)
    choice = answer["choices"][0]
    text = choice["message"]["content"] or ""
    if not isinstance(text, str):
        raise TypeError(f"the content is {shorten(str(text))}, not text")
    num_tokens = (answer.get("usage") or {}).get("completion_tokens")
    num_tokens = num_tokens if isinstance(num_tokens, int) else None
    return Completion(text, choice["finish_reason"], num_tokens, _read_positions(choice.get("logprobs"), num_top))


def _read_positions(block: Any, num_top: int | None) -> tuple[Position, ...]:
    """They are optional: a block that cannot be read is none."""
    try:
        return tuple(_read_position(entry, num_top) for entry in block["content"])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return ()


def _read_position(entry: Mapping, num_top: int | None) -> Position:
    said = _read_token(entry)
    listed = [_read_token(other) for other in entry.get("top_logprobs") or []]
    num_likely = sum(token.logprob > -math.inf for token in listed)
    is_complete = num_top is not None and num_likely < num_top
    return Position(said, tuple(dict.fromkeys([said, *listed])), is_complete)


def _read_token(entry: Mapping) -> Token:
    """Null is the logarithm of 0: SGLang writes it for what its constraint masks."""
    text = bytes(entry["bytes"]) if entry.get("bytes") is not None else entry["token"].encode()
    logprob = -math.inf if entry["logprob"] is None else float(entry["logprob"])
    if not logprob <= _ABOVE_ZERO:
        raise ValueError(f"{logprob} is no log-probability")
    return Token(text, min(logprob, 0.0) if logprob > _NEVER else -math.inf)


def read_reason(body: Any, text: str) -> str:
    """The server's own sentence. body: a refusal's JSON, None where it is none. text: all that it sent."""
    told = body
    while isinstance(told, Mapping):
        told = next((told[name] for name in ("error", "message", "detail", "msg") if told.get(name)), json.dumps(told))
    if isinstance(told, list):
        told = "; ".join(map(_read_complaint, told))
    return shorten(told if isinstance(told, str) and told else text, 300)


def _read_complaint(entry: Any) -> str:
    """One of FastAPI's: {"loc": ["body", "max_tokens"], "msg": "..."}."""
    if not isinstance(entry, Mapping):
        return str(entry)
    where = entry.get("loc")
    place = ".".join(map(str, where)) if isinstance(where, list) else ""
    what = entry.get("msg") or entry.get("type") or json.dumps(entry)
    return f"{place}: {what}" if place else str(what)


def shorten(text: str, limit: int = 120) -> str:
    return repr(text if len(text) <= limit else text[: limit - 3] + "...")
