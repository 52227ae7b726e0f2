"""meta/info.json of a LeRobot data set: what it has, and where."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_local.data.images import choose_camera
from vlm_local.errors import DataError
from vlm_local.files import read_json_object

STATE = "observation.state"
_GENERIC_NAME = re.compile(r"(motor|state|dim)_?\d*")  # a number, not a name
_FIELD = re.compile(r"\{(\w+)(?::(0?\d)d)?\}")


@dataclass(frozen=True)
class Info:
    """image: key of the camera; is_video: or its images lie in the table.

    splits: name -> its first episode, and the one after its last.
    """

    folder: Path
    version: str
    is_v3: bool
    fps: float
    num_episodes: int
    chunk_size: int
    data_path: str
    video_path: str
    camera: str
    image: str
    is_video: bool
    state_width: int
    state_names: tuple[str, ...]
    splits: Mapping[str, tuple[int, int]]

    def find_split(self, split: str | None) -> tuple[int, int]:
        """Its first episode, and the one after its last; of all for None. Raises DataError where there is none."""
        if split is None:
            return 0, self.num_episodes
        if split not in self.splits:
            raise DataError(f"{self.folder} has no split {split!r}; it has {', '.join(self.splits) or 'none'}")
        return self.splits[split]

    def find_file(self, template: str, **names: Any) -> Path:
        """data_path or video_path with its fields filled in. Raises DataError for a path out of the folder."""
        path = _fill_template(template, names)
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise DataError(f"{self.folder}/meta/info.json names {path!r}, which is not in the data set's folder")
        return self.folder / path


def load_info(folder: Path, camera: str | None) -> Info:
    """camera: a camera's name, None for the main one. Raises DataError for what is no LeRobot data set."""
    path = folder / "meta" / "info.json"
    try:
        raw = read_json_object(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    version = str(raw.get("codebase_version", ""))[:40]
    if not version.startswith(("v2.", "v3.")):
        raise DataError(
            f"{folder}: LeRobot format {version or 'without a version'} is not known; expected v2.0, v2.1 or v3.0"
        )
    try:
        return _parse_info(folder, version, raw, camera)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path} is not a LeRobot data set's: {error!r}") from None


def _parse_info(folder: Path, version: str, raw: Mapping[str, Any], camera: str | None) -> Info:
    features = raw["features"]
    cameras = _list_cameras(features)
    camera = choose_camera(cameras, camera, str(folder))
    if STATE not in features:
        raise DataError(f"{folder} has no {STATE}; it has {', '.join(features)}")
    fps, chunk_size = float(raw["fps"]), int(raw.get("chunks_size", 1000))
    if not 0 < fps < 1e4 or chunk_size < 1:
        raise ValueError(f"fps {fps}, chunks_size {chunk_size}")
    return Info(
        folder=folder,
        version=version,
        is_v3=version.startswith("v3."),
        fps=fps,
        num_episodes=int(raw.get("total_episodes") or 0),
        chunk_size=chunk_size,
        data_path=str(raw["data_path"]),
        video_path=str(raw.get("video_path") or ""),
        camera=camera,
        image=cameras[camera],
        is_video=features[cameras[camera]]["dtype"] == "video",
        state_width=int(features[STATE]["shape"][0]),
        state_names=_list_names(features[STATE]),
        splits=_parse_splits(raw.get("splits") or {}),
    )


def _list_cameras(features: Mapping[str, Any]) -> dict[str, str]:
    """Camera name ("image_0") -> key, of the images in colour; depth maps are none."""
    return {
        key.removeprefix("observation.").removeprefix("images."): key
        for key, node in features.items()
        if node["dtype"] in ("video", "image") and not _is_depth(node)
    }


def _is_depth(node: Mapping[str, Any]) -> bool:
    """As LeRobot marks it, or one number a pixel. Shapes are (height, width, channels) or channels first."""
    info = node.get("info") or node.get("video_info") or {}
    is_marked = any(info.get(name) for name in ("video.is_depth_map", "is_depth_map"))
    shape = node.get("shape") or ()
    return is_marked or (len(shape) == 3 and 1 in (shape[0], shape[2]))


def _list_names(feature: Mapping[str, Any]) -> tuple[str, ...]:
    """What a vector's columns are called; empty where they have numbers alone."""
    names = tuple(_flatten_names(feature.get("names")))
    return () if all(map(_GENERIC_NAME.fullmatch, names)) else names


def _flatten_names(names: Any) -> Iterator[str]:
    """Names as writers of data sets put them: in lists, lists of lists, lists by group, or as name -> column."""
    if isinstance(names, dict):
        is_by_column = bool(names) and all(isinstance(column, int) for column in names.values())
        parts = sorted(names, key=lambda name: names[name]) if is_by_column else names.values()
    else:
        parts = names if isinstance(names, list) else ()
    for part in parts:
        if isinstance(part, list | dict):
            yield from _flatten_names(part)
        elif part is not None:
            yield str(part)


def _parse_splits(splits: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """{"train": "0:50"} -> {"train": (0, 50)}; what is written otherwise is left out."""
    matches = {name: re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(value)) for name, value in splits.items()}
    return {name: (int(match[1]), int(match[2])) for name, match in matches.items() if match}


def _fill_template(template: str, names: Mapping[str, Any]) -> str:
    """A path such as "data/chunk-{chunk_index:03d}.parquet" with its names filled in.

    Not by str.format, whose widths and attributes are a stranger's: a width of nine zeros takes a gigabyte.
    """

    def fill(match: re.Match[str]) -> str:
        value = names[match[1]]
        return format(int(value), f"{match[2]}d") if match[2] else str(value)

    if set(_FIELD.sub("", template)) & {"{", "}"} or any(match[1] not in names for match in _FIELD.finditer(template)):
        raise DataError(f"the path {template[:200]!r} in meta/info.json has other fields than {', '.join(names)}")
    return _FIELD.sub(fill, template)
