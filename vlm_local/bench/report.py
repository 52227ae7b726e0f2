"""Saved results of `bench` -> one page, so that every figure in it was measured."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError

_ABOUT = ("benchmark", "versions", "git", "machine")  # told apart from what was measured
_MAX_COLUMNS = 10  # a longer group stands upright
_HEAD = """# Measurements

Written by `.venv/bin/python -m vlm_local bench report`, from the JSON objects in `{folder}/`; each is the last
line that a `bench` command printed, or one that `tests/gpu.sh` wrote (`gpu-*`). Nothing here was typed in by hand.
The words are in docs/glossary.md.

To measure again, on a machine that does nothing else: `bench act` (what the server adds to the engine),
`bench act --doors` (the same for the websocket beside HTTP, the same steps in turns) and `bench decode`, e.g.
`.venv/bin/python -m vlm_local bench act --doors --requests 500 -q`, whose output is `benchmarks/act-doors.json`.
"""


def write_report(folder: Path) -> Path:
    """FOLDER/*.json -> FOLDER.md, in the order of the files' names. Raises ConfigError without any."""
    results = [(path, _load(path)) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise ConfigError(f"{folder} holds no .json; save the last line of a bench command there first")
    page = folder.with_suffix(".md")
    parts = [_HEAD.format(folder=folder.name), *(_format(path.stem, result) for path, result in results)]
    page.write_text("\n".join(parts), encoding="utf-8")
    return page


def _load(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"{path} does not end in a JSON object: {error}") from error
    if not isinstance(result, dict) or "benchmark" not in result:
        raise ConfigError(f"{path} is no result of `bench`: it names no benchmark")
    return result


def _format(name: str, result: Mapping[str, Any]) -> str:
    """Scalars in one table, groups of summaries in one each, and what they were measured with."""
    told = {key: value for key, value in result.items() if key not in _ABOUT and value is not None}
    scalars = {key: value for key, value in told.items() if not isinstance(value, Mapping)}
    lines = [f"## {name}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_show(value)} |" for key, value in scalars.items()]
    singles = {}
    for key, value in told.items():
        if key in scalars:
            continue
        if value and all(isinstance(each, Mapping) for each in value.values()):
            lines += ["", *_tabulate(key, dict(_split_rows(value)))]
        else:
            singles[key] = value
    for key, value in singles.items():
        is_long = len(value) > _MAX_COLUMNS
        rows = {name: {"value": each} for name, each in value.items()} if is_long else {"": value}
        lines += ["", *_tabulate(key, rows)]
    return "\n".join([*lines, "", _describe(result), ""])


def _split_rows(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A row that holds groups becomes one of each group, with what the row says beside them."""
    for name, row in rows.items():
        groups = {key: value for key, value in row.items() if isinstance(value, Mapping)}
        beside = {key: value for key, value in row.items() if key not in groups}
        yield from {f"{name}, {key}": {**group, **beside} for key, group in groups.items()}.items() or [(name, row)]


def _tabulate(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    yield f"| {title} | " + " | ".join(columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for name, row in rows.items():
        yield f"| {name} | " + " | ".join(_show(row.get(column, "")) for column in columns) + " |"


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _describe(result: Mapping[str, Any]) -> str:
    machine = ", ".join(f"{value} {key}" if key == "cores" else str(value) for key, value in result["machine"].items())
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"Measured on {machine}; {versions}; commit {result['git']}."
