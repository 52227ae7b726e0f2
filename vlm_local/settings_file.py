"""A file of policy options: what `tune` has chosen, and what --settings takes."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from vlm_local.errors import ConfigError
from vlm_local.examples import parse_examples
from vlm_local.files import read_json_object, write_json
from vlm_local.policy_options import PolicyOptions

RESULTS = "results"  # what was measured with these options, for people
# Each option's types. Of the machine, and not of the model's answers, are the others.
_TYPES = {
    name: tuple(kind for kind in get_args(hint) if kind is not NoneType)
    for name, hint in get_type_hints(PolicyOptions).items()
    if name not in ("engine", "engine_url", "device", "max_batch", "offline", "deadline_ms")
}


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
