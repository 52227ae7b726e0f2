"""LeRobot data sets v2.0, v2.1 and v3.0: Parquet tables, and images in them or in videos.

v2 has a table and a video per episode; v3 packs several episodes into a file, and says in
meta/episodes/ where each begins.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_local.data.cache import keep_last
from vlm_local.data.images import decode_image, require_one_size
from vlm_local.data.layouts import StateLayout
from vlm_local.data.lerobot_info import STATE, Info, load_info
from vlm_local.data.selection import DataSet, Selection, summarise_instructions
from vlm_local.data.states import choose_layout, convert_actions, convert_states
from vlm_local.data.video import load_frame
from vlm_local.errors import DataError, Report
from vlm_local.files import open_regular, read_foreign_json_lines
from vlm_local.types import Episode

_ACTION = "action"
_MAX_NUMBERS = 100_000_000  # of a table that are read at once


@dataclass(frozen=True)
class _Place:
    """Where an episode lies. length: of it in rows; start_s: its first second in the video.

    tasks: its instructions, in no said order.
    """

    episode: int
    data: Path
    length: int
    video: Path
    start_s: float
    tasks: tuple[str, ...]


def open_data_set(path: Path, selection: Selection, report: Report) -> DataSet:
    """Episodes in the order of the data set's own index.

    selection.camera: e.g. "image_0" for observation.images.image_0; split: of meta/info.json. Raises DataError where
    meta/ cannot be read or the data set has not what an episode needs; a broken episode goes to `report`.
    """
    info = load_info(path, selection.camera)

    def report_line(problem: str) -> None:
        report(DataError(problem))

    try:
        tasks = _load_tasks(info, report_line)
        lines = _list_lines(info, selection.split, report_line)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: {error.strerror}; a LeRobot {info.version} data set needs it"
        ) from None
    except Exception as error:  # a damaged table or line raises nearly anything
        raise DataError(f"{path}/meta does not describe the episodes of a LeRobot data set: {error!r}") from None
    samples = _sample_states(info, lines)
    layout = choose_layout(selection, info.state_width, samples, str(path), info.state_names)
    about = {
        "format": f"LeRobot {info.version}",
        "fps": info.fps,
        "camera": info.camera,
        "splits": sorted(info.splits) if selection.split is None else [selection.split],
        "state_layout": layout.name,
    }
    return DataSet(about, _read_episodes(info, lines, tasks, layout, report))


def count_episodes(path: Path, split: str | None) -> int:
    first, end = load_info(path, None).find_split(split)
    return end - first


def list_numbers(path: Path, split: str | None) -> list[int]:
    """LeRobot's episode_index of each episode, in reading order."""
    lines = _list_lines(load_info(path, None), split, lambda problem: None)
    return [line["episode_index"] for line in lines]


def _list_lines(info: Info, split: str | None, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """A line of meta/ for each episode, in reading order."""
    first, end = info.find_split(split)
    lines = list(_iterate_meta(info, report))
    return lines if split is None else [line for line in lines if first <= line["episode_index"] < end]


def _sample_states(info: Info, lines: list[dict[str, Any]]) -> Iterator[np.ndarray]:
    """States (T, n) of the episodes that can be read."""
    for line in lines:
        try:
            yield _to_matrix(_read_rows(_locate(info, line))[1][STATE])
        except Exception:  # reported when the episode's turn comes
            continue


def _read_episodes(info, lines, tasks, layout: StateLayout, report) -> Iterator[Episode]:
    for index, line in enumerate(lines):
        source = f"{info.folder}, episode {index}"
        try:
            place = _locate(info, line)
            source = f"{place.data}, episode {index}"
            yield _read_episode(index, info, place, tasks, layout)
        except DataError as error:
            report(error)
        except Exception as error:  # a damaged table or line raises nearly anything
            report(DataError(f"{source}: {error!r}"))


def _read_episode(index: int, info: Info, place: _Place, tasks: Mapping[int, str], layout: StateLayout) -> Episode:
    source = f"{place.data}, episode {index}"
    first, rows = _read_rows(place)
    states = convert_states(_to_matrix(rows[STATE]), layout, source)
    actions = convert_actions(_to_matrix(rows[_ACTION]), layout) if _ACTION in rows.column_names else None
    times_s = place.start_s + rows["timestamp"].to_numpy().astype(np.float64) if info.is_video else None
    if times_s is not None and not (np.diff(times_s) > 0).all():
        raise DataError(
            f"{source}: timestamps that rise were expected, since they say which frame of the video is meant"
        )

    def load_image(step: int) -> np.ndarray:
        if times_s is None:
            return _load_image(place.data, info.image, first + step)
        return load_frame(place.video, float(times_s[step]), info.fps)

    default = place.tasks[0] if len(place.tasks) == 1 else ""
    numbers: list[Any] = rows["task_index"].to_pylist() if "task_index" in rows.column_names else [None]
    said = summarise_instructions([tasks.get(number, default).strip() for number in numbers])
    return Episode(index, said[0], states, actions, require_one_size(load_image, source), source, said[1])


def _read_rows(place: _Place) -> tuple[int, pa.Table]:
    """The first row of an episode in its table, and the numbers of its steps.

    Raises DataError where the table has other rows than meta/ says, or not in the order of time: labels across a gap,
    or backwards, would be wrong.
    """
    table, runs = _read_table(place.data)
    found = runs.get(place.episode, [])
    length = sum(run[1] for run in found)
    if length != place.length:
        raise DataError(
            f"{place.data}: meta/ says {place.length} rows of episode {place.episode}, the table has {length}"
        )
    first = found[0][0]
    rows = table.slice(first, length)
    is_counted = "frame_index" not in rows.column_names or (np.diff(rows["frame_index"].to_numpy()) == 1).all()
    if len(found) > 1 or not is_counted:
        raise DataError(f"{place.data}: the rows of episode {place.episode} do not follow each other without a gap")
    return first, rows


@keep_last  # v3 keeps neighbouring episodes in one file
def _read_table(path: Path) -> tuple[pa.Table, dict[int, list[tuple[int, int]]]]:
    """The columns of numbers, since images are read one by one; and episode_index -> (first row, rows) of its runs."""
    file = pq.ParquetFile(path)
    wanted = (STATE, _ACTION, "timestamp", "task_index", "episode_index", "frame_index")
    table = _read_columns(file, [name for name in wanted if name in file.schema_arrow.names])
    numbers = table["episode_index"].to_numpy()
    ends = [*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
    runs: dict[int, list[tuple[int, int]]] = {}
    for first, end in pairwise([0, *ends]):
        if end > first:
            runs.setdefault(numbers[first].item(), []).append((first, end - first))
    return table, runs


def _read_columns(file: pq.ParquetFile, names: list[str]) -> pa.Table:
    """Raises DataError where a few bytes stand for more numbers than memory may hold."""
    groups = (file.metadata.row_group(group) for group in range(file.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    num_values = sum(column.num_values for column in columns if column.path_in_schema.partition(".list")[0] in names)
    if max(num_values, file.metadata.num_rows) > _MAX_NUMBERS:
        raise DataError(f"the table claims {num_values} numbers; at most {_MAX_NUMBERS} are read")
    return file.read(names)


def _to_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Lists of equal length -> (T, n). Raises ValueError for others."""
    values = column.combine_chunks()
    if len(set(values.value_lengths().to_pylist())) != 1 or values.null_count:
        raise ValueError("as many numbers in every row were expected")
    numbers = values.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(values), -1)


def _load_image(table: Path, name: str, row: int) -> np.ndarray:
    source = f"{table}, row {row}"
    try:
        cell = _open_images(table, name).read(row)
        data = cell["bytes"]
    except (OSError, LookupError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{source}: {error!r}") from None
    if data is None:
        raise DataError(f"{source}: the image is not in the table but in {cell.get('path')}, which is not supported")
    return decode_image(data, source)


class _Images:
    """Encoded images in a table; holds one row group."""

    def __init__(self, path: Path, name: str):
        self._file, self._name = pq.ParquetFile(path), name
        counts = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        self._ends = np.cumsum(counts)
        self._group, self._cells = -1, []

    def close(self) -> None:
        self._file.close()

    def read(self, row: int) -> dict[str, Any]:
        """An image's cell, {"bytes", "path"}. Raises IndexError for a row that is not there."""
        group = int(np.searchsorted(self._ends, row, "right"))
        if group != self._group:
            self._cells = []  # frees the last group's memory first
            self._cells, self._group = self._file.read_row_group(group, [self._name])[self._name], group
        return self._cells[row - int(self._ends[group]) + len(self._cells)].as_py()


_open_images = keep_last(_Images)


def _locate(info: Info, line: Mapping[str, Any]) -> _Place:
    place = _locate_v3(info, line) if info.is_v3 else _locate_v2(info, line)
    if place.episode < 0 or place.length < 1:
        raise DataError(f"{place.data}: meta/ says that episode {place.episode} has {place.length} rows")
    return place


def _locate_v2(info: Info, line: Mapping[str, Any]) -> _Place:
    number = line["episode_index"]
    names = {"episode_index": number, "episode_chunk": number // info.chunk_size, "video_key": info.image}
    return _Place(
        episode=number,
        data=info.find_file(info.data_path, **names),
        length=line["length"],
        video=info.find_file(info.video_path, **names),
        start_s=0.0,
        tasks=tuple(line.get("tasks") or ()),
    )


def _locate_v3(info: Info, line: Mapping[str, Any]) -> _Place:
    video, start_s = Path(), 0.0
    if info.is_video:
        prefix = f"videos/{info.image}/"
        names = {"chunk_index": line[f"{prefix}chunk_index"], "file_index": line[f"{prefix}file_index"]}
        video = info.find_file(info.video_path, video_key=info.image, **names)
        start_s = float(line[f"{prefix}from_timestamp"])
    return _Place(
        episode=line["episode_index"],
        data=info.find_file(info.data_path, chunk_index=line["data/chunk_index"], file_index=line["data/file_index"]),
        length=line["length"],
        video=video,
        start_s=start_s,
        tasks=tuple(line.get("tasks") or ()),
    )


def _iterate_meta(info: Info, report: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """A line per episode."""
    if not info.is_v3:
        yield from read_foreign_json_lines(info.folder / "meta" / "episodes.jsonl", report)
        return
    files = sorted((info.folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise ValueError("meta/episodes holds no Parquet file")
    for path in files:
        with open_regular(path) as file:
            table = pq.ParquetFile(file)
            names = [name for name in table.schema_arrow.names if not name.startswith("stats/")]
            yield from _read_columns(table, names).to_pylist()


def _load_tasks(info: Info, report: Callable[[str], None]) -> dict[int, str]:
    """task_index -> instruction."""
    meta = info.folder / "meta"
    if not info.is_v3:
        return {line["task_index"]: line["task"] for line in read_foreign_json_lines(meta / "tasks.jsonl", report)}
    with open_regular(meta / "tasks.parquet") as file:
        table = pq.read_table(file)
    name = "task" if "task" in table.column_names else "__index_level_0__"  # pandas' name for a plain index
    return dict(zip(table["task_index"].to_pylist(), table[name].to_pylist(), strict=True))
