"""What a server's answer says: text, end and log-probabilities. No network."""

import json
from collections.abc import Mapping
from typing import Any

from vlm_local.engines.masses import Position, Token


def read_completion(body: bytes) -> dict[str, Any]:
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


def shorten(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
