"""A copy of a LeRobot v3 data set with movement phrases in its language column.

LeRobot keeps what is said of an episode in the column `language_persistent`: each frame holds the episode's whole
list of rows, and a row holds from its timestamp until the next one of its style. The style `motion` is meant for
motion primitives in the robot's frame (lerobot 0.6, datasets/language.py).
"""

import shutil
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_local.data import find_lerobot
from vlm_local.data.lerobot import list_numbers
from vlm_local.data.lerobot_info import load_info
from vlm_local.errors import DataError
from vlm_local.files import read_json_object, write_json

STYLE = "motion"
_PERSISTENT, _EVENTS = "language_persistent", "language_events"
_EVENT_FIELDS = ("role", "content", "style", "camera", "tool_calls")
_TYPES = {"timestamp": pa.float32(), "tool_calls": pa.list_(pa.string())}
_PERSISTENT_FIELDS = ("role", "content", "style", "timestamp", "camera", "tool_calls")


def check_target(path: str | Path, out: Path) -> None:
    """Raises DataError where `out` cannot become a copy of the data set `path`.

    That is: a data set that is not LeRobot v3 (older versions have no language columns), or a folder that exists.
    """
    folder = find_lerobot(path)
    if not load_info(folder, None).is_v3:
        raise DataError(f"{folder} is older than LeRobot v3 and has no language columns; LeRobot converts it to v3")
    if out.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{out} lies in {folder}, which is never written to")
    if out.exists():
        raise DataError(f"{out} exists; name another folder, or delete it")


def write_motions(path: str | Path, out: Path, split: str | None, phrases: Mapping[int, Sequence[str]]) -> int:
    """Copy the data set into `out`, with a row of style `motion` wherever the phrase changes; returns how many.

    phrases: the phrase of each step, by the episode's place in the reading order of `split`; episodes that are not in
    it get no such row. Rows of other styles stay, those of this style are replaced. Raises DataError as check_target
    does, and for an episode that has not as many steps as phrases.
    """
    check_target(path, out)
    folder = find_lerobot(path)
    numbers = list_numbers(folder, split)
    shutil.copytree(folder, out)
    try:
        files = sorted(out.glob("data/*/*.parquet"))
        times = _read_times(files)
        rows = {numbers[place]: _build_rows(numbers[place], said, times) for place, said in phrases.items()}
        for file in files:
            _rewrite(file, rows)
        _describe_columns(out / "meta" / "info.json")
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # half a copy looks like a whole one
        raise
    return sum(map(len, rows.values()))


def _read_times(files: Sequence[Path]) -> dict[int, list[float]]:
    """episode_index -> timestamps of its frames."""
    times: dict[int, list[float]] = {}
    for file in files:
        table = pq.read_table(file, columns=["episode_index", "timestamp"])
        for episode, time_s in zip(table["episode_index"].to_pylist(), table["timestamp"].to_pylist(), strict=True):
            times.setdefault(episode, []).append(time_s)
    return times


def _build_rows(episode: int, phrases: Sequence[str], times: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    if len(times.get(episode, ())) != len(phrases):
        raise DataError(
            f"episode {episode} has {len(times.get(episode, ()))} frames in the tables and {len(phrases)} phrases"
        )
    steps = zip(times[episode], phrases, strict=True)
    changes = [next(same) for _, same in groupby(steps, key=lambda step: step[1])]
    return [
        {
            "role": "assistant",
            "content": phrase,
            "style": STYLE,
            "timestamp": time_s,
            "camera": None,
            "tool_calls": None,
        }
        for time_s, phrase in changes
    ]


def _rewrite(path: Path, rows: Mapping[int, list[dict[str, Any]]]) -> None:
    """One row group after another: a file may hold 100 MB of pictures."""
    rewritten = path.with_suffix(".new")
    with pq.ParquetFile(path) as source:
        writer = None
        for number in range(source.num_row_groups):
            table = _add_columns(source.read_row_group(number), rows)
            writer = writer or pq.ParquetWriter(rewritten, table.schema)
            writer.write_table(table, row_group_size=max(1, table.num_rows))
        if writer is None:
            return  # a file without rows
        writer.close()
    rewritten.replace(path)


def _add_columns(table: pa.Table, rows: Mapping[int, list[dict[str, Any]]]) -> pa.Table:
    names = table.column_names
    episodes = table["episode_index"].to_pylist()
    old: list[Any] = table[_PERSISTENT].to_pylist() if _PERSISTENT in names else [None] * len(episodes)
    cells = [
        sorted(
            [row for row in said or [] if row["style"] != STYLE] + rows.get(episode, []),
            key=lambda row: row["timestamp"],
        )
        for said, episode in zip(old, episodes, strict=True)
    ]
    table = _put(table, _PERSISTENT, _build_column(cells, _PERSISTENT_FIELDS))
    if _EVENTS not in names:
        table = _put(table, _EVENTS, _build_column([[] for _ in episodes], _EVENT_FIELDS))
    # The types that Hugging Face's datasets notes beside the schema know nothing of the new columns.
    notes = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"huggingface"}
    return table.replace_schema_metadata(notes)


def _build_column(cells: Sequence[Sequence[Mapping[str, Any]]], fields: Sequence[str]) -> pa.Array:
    """Lists of structs with LeRobot's types; tool_calls are JSON texts where pyarrow knows such a type."""
    rows = [row for cell in cells for row in cell]
    columns, types = [], []
    for name in fields:
        values = [row[name] for row in rows]
        column = pa.array(values, _TYPES.get(name, pa.string()))
        if name == "tool_calls" and hasattr(pa, "json_"):  # pa.array builds no column of this type
            texts = pa.ExtensionArray.from_storage(pa.json_(), column.values)
            missing = pa.array([value is None for value in values], pa.bool_())
            column = pa.ListArray.from_arrays(column.offsets, texts, mask=missing)
        columns.append(column)
        types.append(pa.field(name, column.type, nullable=name not in ("role", "timestamp")))
    offsets = np.cumsum([0, *map(len, cells)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays(columns, fields=types))


def _put(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, column)
    return table.append_column(name, column)


def _describe_columns(path: Path) -> None:
    info = read_json_object(path)
    for name in (_PERSISTENT, _EVENTS):
        info["features"][name] = {"dtype": "language", "shape": [1], "names": None}
    write_json(path, info)
