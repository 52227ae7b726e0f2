"""How servers behind an OpenAI-compatible API are told to say one of given sentences. No network.

Unknown fields are ignored by all of them with status 200, so a dialect counts for nothing until the
server has obeyed it.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
