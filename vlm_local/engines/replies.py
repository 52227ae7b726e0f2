"""What a server's answer says: text, end and log-probabilities; or why it refused. No network."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_local.engines.masses import Position, Token

_NEVER = -9999.0  # what OpenAI and vLLM write for a token that has no chance
_ABOVE_ZERO = 0.01  # a logarithm rounded in 16 bits may be this far above 0


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
