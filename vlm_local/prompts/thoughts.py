"""What a model writes down before it moves: a file that names fields and asks for them.

The file is a JSON object. `ask`: the question behind the present picture, in which `$name` is filled in as in a
prompt's `[after]`. `fields`: name -> most tokens of its text, in the order in which they are written.
"""

import hashlib
import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

from vlm_local.errors import ConfigError, suggest
from vlm_local.prompts import parse_block

MAX_FIELDS = 16
MAX_TOKENS = 512  # of all fields; a prompt's text may have 1,536

_FOLDER = Path(__file__).resolve().parent
_NAME = re.compile(r"[A-Z][A-Za-z ]{0,39}")


@dataclass(frozen=True)
class ThoughtPlan:
    """name, sha256: of the file. ask: the question. fields: (name, most tokens) in order."""

    name: str
    sha256: str
    ask: string.Template
    fields: tuple[tuple[str, int], ...]


def load_thought_plan(name: str | Path) -> ThoughtPlan:
    """A shipped file by name ("ecot") or the user's own by path. Raises ConfigError for what is none."""
    path = Path(name) if "." in str(name) else _FOLDER / f"{name}.json"
    try:
        data = path.read_bytes()
        told = json.loads(data)
    except (OSError, ValueError) as error:
        shipped = sorted(file.stem for file in _FOLDER.glob("*.json"))
        raise ConfigError(
            f"--think {name}: cannot read {path} ({error}){suggest(path.stem, shipped)}; shipped: {', '.join(shipped)}"
        ) from None
    if not isinstance(told, dict) or set(told) != {"ask", "fields"} or not isinstance(told["ask"], str):
        raise ConfigError(f'{path}: expected a JSON object {{"ask": "a question", "fields": {{"NAME": tokens}}}}')
    if not told["ask"].strip():
        raise ConfigError(f"{path}: `ask` is empty; it must ask for the fields")
    ask, fields = parse_block("after", told["ask"], path), _read(told["fields"], path)
    return ThoughtPlan(path.stem, hashlib.sha256(data).hexdigest(), ask, fields)


def _read(fields: object, path: Path) -> tuple[tuple[str, int], ...]:
    if not isinstance(fields, dict) or not 1 <= len(fields) <= MAX_FIELDS:
        raise ConfigError(f"{path}: `fields` must name 1 to {MAX_FIELDS} fields, each with its most tokens")
    for name, tokens in fields.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: a field's name is a capital, then letters and spaces, 40 at most; not {name!r}")
        if type(tokens) is not int or not 1 <= tokens <= MAX_TOKENS:
            raise ConfigError(f"{path}: {name} must have 1 to {MAX_TOKENS} tokens, not {tokens!r}")
    return tuple(fields.items())
