"""Recorded episodes -> a LeRobot v3.0 data set: a Parquet file an episode, frames in it as PNG, lossless."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlm_local.data.images import encode_file
from vlm_local.data.runs import RecordedEpisode, choose_action
from vlm_local.errors import DataError, Report
from vlm_local.files import write_json

FPS = 5
IMAGE, STATE, ACTION = "observation.images.camera", "observation.state", "action"
_STATE_NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
_PATH = "{folder}/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_CHUNK = 1000  # files a folder
_COUNTERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
_COUNTERS |= {"task_index": "int64"}
_TYPES = {"float32": pa.float32(), "int64": pa.int64(), "string": pa.string()}


def export_lerobot(episodes: Iterable[RecordedEpisode], folder: Path, report: Report) -> tuple[int, int]:
    """Write a data set into `folder`, which must not exist; returns (episodes, frames).

    Beside LeRobot's own columns it holds `phrase`, empty where a step had none. An episode that a
    data set cannot hold (no proprio, a frame of another size) goes to `report`. Raises DataError
    for a folder that exists.
    """
    if folder.exists():
        raise DataError(f"{folder} exists; name another --out, or delete it")
    book = _Book(folder)
    for episode in episodes:
        try:
            book.add(episode)
        except DataError as error:
            report(error)
    if book.places:
        book.close()
    return len(book.places), book.num_frames


@dataclass
class _Book:
    """What the metadata of a data set needs to know of the episodes written so far."""

    folder: Path
    places: list[dict[str, Any]] = field(default_factory=list)
    tasks: dict[str, int] = field(default_factory=dict)
    stats: dict[str, "_Moments"] = field(default_factory=dict)
    num_frames: int = 0
    image_shape: tuple[int, ...] | None = None

    def add(self, episode: RecordedEpisode) -> None:
        _check_lines(episode)
        images = [episode.load_image(step) for step in range(len(episode.lines))]
        shape = self.image_shape or images[0].shape
        if images[0].shape != shape:
            raise DataError(f"{episode.source}: frames are {images[0].shape}, those of the data set {shape}")
        self.image_shape = shape
        columns = self._read_columns(episode)  # counts its task, so only now
        for name, values in columns.items():
            if values.dtype != object:
                self.stats.setdefault(name, _Moments()).add(values.reshape(len(values), -1))
        for image in images:
            self.stats.setdefault(IMAGE, _Moments()).add(image.reshape(-1, 3) / 255.0)
        self._write(columns, images)

    def _read_columns(self, episode: RecordedEpisode) -> dict[str, np.ndarray]:
        """Column name -> (T,) or (T, 7)."""
        lines, length = episode.lines, len(episode.lines)
        task = str(lines[0].get("instruction") or "")
        frames = np.arange(length, dtype=np.int64)
        return {
            STATE: np.array([line["proprio"] for line in lines], np.float32).reshape(length, 7),
            ACTION: np.array([choose_action(line) for line in lines], np.float32).reshape(length, 7),
            "phrase": np.array([line.get("phrase") or "" for line in lines], object),
            "timestamp": (frames / FPS).astype(np.float32),
            "frame_index": frames,
            "episode_index": np.full(length, len(self.places), np.int64),
            "index": self.num_frames + frames,
            "task_index": np.full(length, self.tasks.setdefault(task, len(self.tasks)), np.int64),
        }

    def _write(self, columns: dict[str, np.ndarray], images: list[np.ndarray]) -> None:
        arrays = {name: pa.array(list(values), _arrow_type(values)) for name, values in columns.items()}
        cells = [
            {"bytes": encode_file(image, "PNG"), "path": f"frame-{step:06d}.png"} for step, image in enumerate(images)
        ]
        arrays[IMAGE] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        number, length = len(self.places), len(images)
        where = {"chunk_index": number // _CHUNK, "file_index": number % _CHUNK}
        _write_table(self.folder / _PATH.format(folder="data", **where), pa.table(arrays), row_group_size=64)
        task = next(name for name, index in self.tasks.items() if index == columns["task_index"][0])
        self.places.append(
            {
                "episode_index": number,
                "tasks": [task],
                "length": length,
                **{f"data/{name}": value for name, value in where.items()},
                "dataset_from_index": self.num_frames,
                "dataset_to_index": self.num_frames + length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
            }
        )
        self.num_frames += length

    def close(self) -> None:
        meta = self.folder / "meta"
        path = _PATH.format(folder="episodes", chunk_index=0, file_index=0)
        _write_table(meta / path, pa.Table.from_pylist(self.places))
        _write_table(meta / "tasks.parquet", _build_task_table(list(self.tasks)))
        stats = {name: moments.summarise() for name, moments in self.stats.items()}
        stats[IMAGE] = {
            name: value if name == "count" else [[[number]] for number in value] for name, value in stats[IMAGE].items()
        }
        write_json(meta / "stats.json", stats)
        write_json(meta / "info.json", self._describe())

    def _describe(self) -> dict[str, Any]:
        vector = {"dtype": "float32", "shape": [7], "names": _STATE_NAMES}
        single = {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in _COUNTERS.items()}
        return {
            "codebase_version": "v3.0",
            "robot_type": "widowx",
            "total_episodes": len(self.places),
            "total_frames": self.num_frames,
            "total_tasks": len(self.tasks),
            "chunks_size": _CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": FPS,
            "splits": {"train": f"0:{len(self.places)}"},
            "data_path": _PATH.replace("{folder}", "data"),
            "video_path": None,
            "features": {
                IMAGE: {
                    "dtype": "image",
                    "shape": list(self.image_shape or ()),
                    "names": ["height", "width", "channels"],
                },
                STATE: vector,
                ACTION: vector,
                "phrase": {"dtype": "string", "shape": [1], "names": None},
                **single,
            },
        }


def _check_lines(episode: RecordedEpisode) -> None:
    if not episode.lines:
        raise DataError(f"{episode.source}: the episode has no steps")
    for name, feature in (("proprio", STATE), ("action", ACTION)):
        if any(line.get(name) is None for line in episode.lines):
            raise DataError(f"{episode.source}: the episode has steps without {name}, which LeRobot's {feature} needs")


class _Moments:
    """Least, greatest, mean and spread of rows that come a few at a time."""

    def __init__(self):
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self._low, self._high = np.inf, -np.inf

    def add(self, rows: np.ndarray) -> None:
        """rows: (n, k)."""
        rows = rows.astype(np.float64)
        self._count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + (rows**2).sum(0)
        self._low, self._high = np.minimum(self._low, rows.min(0)), np.maximum(self._high, rows.max(0))

    def summarise(self) -> dict[str, list]:
        mean = self._sum / self._count
        spread = np.sqrt(np.maximum(self._squares / self._count - mean**2, 0.0))
        stats = {"min": self._low, "max": self._high, "mean": mean, "std": spread}
        return {**{name: value.tolist() for name, value in stats.items()}, "count": [self._count]}


def _build_task_table(tasks: list[str]) -> pa.Table:
    """task_index under the task's words as pandas' index, which is where LeRobot looks for them."""
    columns = [
        {"name": name, "field_name": column, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
        for name, column, kind, numpy in (
            ("task_index", "task_index", "int64", "int64"),
            (None, "__index_level_0__", "unicode", "object"),
        )
    ]
    note = {"index_columns": ["__index_level_0__"], "column_indexes": [], "columns": columns, "pandas_version": "2.2.0"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), "__index_level_0__": tasks})
    return table.replace_schema_metadata({"pandas": json.dumps(note)})


def _arrow_type(values: np.ndarray) -> pa.DataType:
    if values.dtype == object:
        return pa.string()
    single = _TYPES[str(values.dtype)]
    return single if values.ndim == 1 else pa.list_(single, values.shape[1])


def _write_table(path: Path, table: pa.Table, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
