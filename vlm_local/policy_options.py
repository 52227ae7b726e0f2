"""A user's choices about a policy, as they were made on a command line or stand in a file.

An option that is None comes from the checkpoint's vlm_local.json, else from DEFAULTS.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from vlm_local.embodiments import AUTO
from vlm_local.errors import ConfigError
from vlm_local.examples import parse_examples
from vlm_local.files import read_json_object, write_json
from vlm_local.registry import DEFAULT

DEFAULTS = {
    "model": DEFAULT,
    "quantize": "none",
    "device": "auto",
    "dtype": "auto",
    "grammar": "primitives",
    "decoder": "trie",
    "decide": "greedy",
    "temperature": 1.0,
    "posterior": "fast",
    "history": 0,
    "contrast": 0.0,
    "example_choice": "fixed",
    "frames": 0,
    "frame_every": 1,
    "frame_choice": "last",
    "think_every": 5,
    "think_tokens": 200,
    "embodiment": AUTO,
    "steps_per_phrase": 1,
    "max_batch": 8,
}
RESULTS = "results"  # what was measured with these options, for people


@dataclass(frozen=True)
class PolicyOptions:
    """A user's choices about a policy; one field for each policy flag of `serve --help`, None where nothing is chosen.

    model: a registry name, folder or repository; "random", "stop" or any phrase for a baseline; the
        http(s) URL of a policy server; with engine "openai" the model's name at the server.
    engine: "local" or "openai". engine_url: base URLs of the latter, joined by commas.
    embodiment: a name, a file or "auto": steps and words about the camera come from it, and what else depends on the
        robot. steps: a step table's JSON file, before the embodiment's.
    examples: "DATA" or "DATA:N", see examples.load_examples. frames, frame_every, frame_choice: as FrameSettings.
    think: a shipped file of fields by name, or a path. think_every, think_tokens: as in thinking.ThinkSettings.
    deadline_ms: from a request to its answer, None for any time.
    """

    model: str | None = None
    engine: str = "local"
    engine_url: str | None = None
    quantize: str | None = None
    device: str | None = None
    dtype: str | None = None
    grammar: str | None = None
    decoder: str | None = None
    decide: str | None = None
    temperature: float | None = None
    posterior: str | None = None
    prompt: str | None = None
    marks: str | None = None
    contrast: float | None = None
    history: int | None = None
    examples: str | None = None
    example_choice: str | None = None
    frames: int | None = None
    frame_every: int | None = None
    frame_choice: str | None = None
    think: str | None = None
    think_every: int | None = None
    think_tokens: int | None = None
    steps_per_phrase: int | None = None
    max_batch: int | None = None
    embodiment: str | None = None
    steps: str | None = None
    offline: bool = False
    deadline_ms: float | None = None


# Types of the options that a settings file may hold: of those that decide what is answered. The others say where the
# model runs and how long it may take.
_TYPES = {
    name: tuple(kind for kind in get_args(hint) if kind is not NoneType)
    for name, hint in get_type_hints(PolicyOptions).items()
    if name not in ("engine", "engine_url", "device", "max_batch", "offline", "deadline_ms")
}


def refuse(options: PolicyOptions, unused: Sequence[str], before: str, after: str) -> None:
    """Raise ConfigError for flags that were given: they stand between `before` and `after`."""
    plain = PolicyOptions()
    given = [f"--{name.replace('_', '-')}" for name in unused if getattr(options, name) != getattr(plain, name)]
    if given:
        raise ConfigError(f"{before} {', '.join(given)}{after}".lstrip())


def read_settings(path: Path) -> dict[str, Any]:
    """Options by their names in PolicyOptions. A relative `prompt` or `examples` file stands beside this file.

    Raises ConfigError for a file that holds anything else.
    """
    try:
        told = read_json_object(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--settings {path} cannot be read: {error}") from None
    options = {name: value for name, value in told.items() if name != RESULTS and value is not None}
    for name, value in options.items():
        if name not in _TYPES:
            raise ConfigError(f"--settings {path}: there is no option {name!r}; it may hold {', '.join(_TYPES)}")
        types = (int, float) if float in _TYPES[name] else _TYPES[name]
        if not isinstance(value, types) or isinstance(value, bool):
            raise ConfigError(f"--settings {path}: {name!r} is {value!r}, which is of the wrong type")
    if "prompt" in options and (path.parent / options["prompt"]).is_file():
        options["prompt"] = str(path.parent / options["prompt"])
    if "examples" in options and (path.parent / parse_examples(options["examples"])[0]).is_file():
        options["examples"] = str(path.parent / options["examples"])
    return options


def write_settings(path: Path, options: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """options: as `read_settings` gives them, None for what is not chosen. Others than a file may hold are left out."""
    chosen = {name: options[name] for name in _TYPES if options.get(name) is not None}
    write_json(path, {**chosen, RESULTS: results})
