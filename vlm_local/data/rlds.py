"""RLDS data sets as TensorFlow Datasets writes them: features.json and TFRecord shards.

Steps are raw: step 0 is kept, so labels and images stay aligned. The metadata's flags (has_image_*, is_last) are
wrong in Bridge and are not used.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlm_local.data.cache import keep_last
from vlm_local.data.images import choose_camera, decode_image, require_one_size
from vlm_local.data.layouts import StateLayout
from vlm_local.data.selection import DataSet, Selection, summarise_instructions
from vlm_local.data.states import choose_layout, convert_actions, convert_states
from vlm_local.data.tfrecord import count_records, decode_bytes, decode_floats, parse_example, read_records
from vlm_local.errors import DataError, Report, refuse
from vlm_local.files import read_json_object
from vlm_local.types import Episode

_STATES = ("steps/observation/state", "steps/observation/proprio")
_INSTRUCTIONS = (
    "steps/language_instruction",
    "steps/observation/natural_language_instruction",
    "episode_metadata/language_instruction",
)
_ACTION = "steps/action"
# "demo-train.tfrecord-00000-of-00002", or a whole split in one file, "demo-train.tfrecord".
_SHARD = re.compile(r"(?P<name>.+?(?:-(?P<split>[^-.]+))?\.tfrecord)(?:-(?P<number>\d{5})-of-(?P<total>\d{5}))?")


class _Shard(NamedTuple):
    """split: from the file's name, "" where it has none."""

    path: Path
    split: str


class _Place(NamedTuple):
    """offset: of a record in its file, in bytes."""

    path: Path
    offset: int

    def __str__(self) -> str:
        return f"{self.path}, byte {self.offset}"


@dataclass(frozen=True)
class _Columns:
    """Names of the features to read; state_width and action_width are numbers a step."""

    image: str
    state: str
    state_width: int
    action: str | None
    action_width: int
    instruction: str


def open_data_set(path: Path, selection: Selection, report: Report) -> DataSet:
    """A folder with features.json (or one TFRecord file in it), one record in memory.

    selection.camera: name of an image feature, e.g. "image_0"; split: of the shards' names. Raises DataError where
    the data set has not what an episode needs; a broken record goes to `report`, and uses its index up.
    """
    folder = path if path.is_dir() else path.parent
    features = _load_features(folder / "features.json")
    cameras = _list_cameras(features)
    camera = choose_camera(cameras, selection.camera, str(folder))
    columns = _choose_columns(features, cameras[camera], folder)
    shards = _choose_shards(path, selection.split)
    if path.is_dir():
        _report_missing(shards, report)
    states = _sample_states(shards, columns)
    description = str(features[columns.state].get("description", ""))
    layout = choose_layout(selection, columns.state_width, states, str(folder), description=description)
    about = {
        "format": "RLDS",
        "camera": camera,
        "splits": sorted({shard.split for shard in shards}),
        "state_layout": layout.name,
    }
    return DataSet(about, _read_episodes(shards, columns, layout, report))


def count_episodes(path: Path, split: str | None) -> int:
    """Records that the headers of the split's shards promise."""
    return sum(count_records(shard.path) for shard in _choose_shards(path, split))


def _sample_states(shards: list[_Shard], columns: _Columns) -> Iterator[np.ndarray]:
    """States (T, state_width) of the records that can be read."""
    for shard in shards:
        for _, data in read_records(shard.path, lambda error: None):
            try:
                yield decode_floats(parse_example(data or b"")[columns.state]).reshape(-1, columns.state_width)
            except (KeyError, ValueError):
                continue


def _read_episodes(shards, columns: _Columns, layout: StateLayout, report) -> Iterator[Episode]:
    index = -1
    for shard in shards:
        for offset, data in read_records(shard.path, report):
            index += 1
            if data is None:
                continue
            place = _Place(shard.path, offset)
            try:
                yield _parse_episode(index, data, columns, layout, place)
            except ValueError as error:
                report(DataError(f"{place}: not a record of this data set ({error})"))
            except DataError as error:
                report(error)


def _parse_episode(index: int, data: bytes, columns: _Columns, layout: StateLayout, place: _Place) -> Episode:
    source = str(place)
    features = parse_example(data)
    missing = [name for name in (columns.state, columns.image, columns.instruction) if name not in features]
    if missing:
        raise DataError(f"{source}: the record lacks {', '.join(missing)}")
    states = convert_states(decode_floats(features[columns.state]).reshape(-1, columns.state_width), layout, source)
    actions = None
    if columns.action in features:
        actions = convert_actions(decode_floats(features[columns.action]).reshape(-1, columns.action_width), layout)
    num_images = len(decode_bytes(features[columns.image]))
    instructions = [str(text, "utf-8").strip() for text in decode_bytes(features[columns.instruction])]
    if num_images != len(states) or not (actions is None or len(actions) == len(states)):
        raise DataError(f"{source}: {len(states)} states, but {num_images} images or another number of actions")

    def load_image(step: int) -> np.ndarray:
        try:
            image = bytes(_read_images(place.path, place.offset, columns.image)[step])
        except (OSError, LookupError, ValueError) as error:  # the file has changed since
            raise DataError(f"{source}: the record can no longer be read ({error!r})") from None
        return decode_image(image, f"{source}, step {step}")

    if len(instructions) not in (0, 1, len(states)):  # once, or for each step
        raise DataError(f"{source}: {len(states)} states, but {len(instructions)} instructions")
    said = summarise_instructions(instructions)
    return Episode(index, said[0], states, actions, require_one_size(load_image, source), source, said[1])


@keep_last
def _read_images(path: Path, offset: int, name: str) -> list[memoryview]:
    """The encoded images of a record."""
    _, data = next(read_records(path, refuse, offset), (offset, None))
    if data is None:
        raise ValueError("the file ends before it")
    return decode_bytes(parse_example(data)[name])


def _load_features(path: Path) -> dict[str, Mapping[str, Any]]:
    """features.json -> feature name as in the records ("steps/action") -> its description."""
    flat: dict[str, Mapping[str, Any]] = {}

    def walk(node: Mapping[str, Any], name: str) -> None:
        if "featuresDict" in node:
            for key, child in node["featuresDict"]["features"].items():
                walk(child, f"{name}/{key}" if name else key)
        elif "sequence" in node:
            walk(node["sequence"]["feature"], name)
        else:
            flat[name] = node

    try:
        walk(read_json_object(path), "")
    except (OSError, RecursionError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} does not describe the features of an RLDS data set: {error!r}") from None
    if not any(name.startswith("steps/") for name in flat):
        raise DataError(f"{path} describes no steps of episodes (featuresDict: steps: sequence), as RLDS has them")
    return flat


def _list_cameras(features: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Camera name ("image_0") -> feature, of the steps' images in colour; depth maps and masks are none."""
    return {
        name.removeprefix("steps/").removeprefix("observation/"): name
        for name, node in features.items()
        if name.startswith("steps/") and "image" in node and _is_colour(node["image"])
    }


def _is_colour(image: Any) -> bool:
    """Of an image feature's description, as far as it has one."""
    if not isinstance(image, dict):
        return False
    shape = image.get("shape")
    dimensions = shape.get("dimensions", []) if isinstance(shape, dict) else []
    return str(image.get("dtype", "uint8")) == "uint8" and (not dimensions or str(dimensions[-1]) == "3")


def _choose_columns(features: Mapping[str, Mapping[str, Any]], image: str, folder: Path) -> _Columns:
    found = []
    for candidates in (_STATES, _INSTRUCTIONS):
        names = [name for name in candidates if name in features]
        if not names:
            raise DataError(f"{folder}/features.json has none of {', '.join(candidates)}; it has {', '.join(features)}")
        found.append(names[0])
    state, instruction = found
    action = _ACTION if _ACTION in features else None
    action_width = _count_numbers(features[action], action, folder) if action else 0
    return _Columns(image, state, _count_numbers(features[state], state, folder), action, action_width, instruction)


def _count_numbers(node: Mapping[str, Any], name: str, folder: Path) -> int:
    """Numbers a step of a tensor feature."""
    try:
        tensor = node["tensor"]
        if not tensor["dtype"].startswith("float") or tensor.get("encoding", "none").lower() != "none":
            raise ValueError("other numbers")
        width = prod(int(size) for size in tensor["shape"].get("dimensions", []))
        if not 0 < width < 1000:
            raise ValueError(f"{width} numbers")
        return width
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DataError(f"{folder}/features.json: {name} must be an unencoded tensor of floats, not {node}") from None


def _choose_shards(path: Path, split: str | None) -> list[_Shard]:
    """The TFRecord files of a folder, or the one file, by name; those of one split where it is named."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    matches = ((file, _SHARD.fullmatch(file.name)) for file in files)
    shards = [_Shard(file, match["split"] or "") for file, match in matches if match]
    if not shards:
        raise DataError(f"{path} has features.json but no TFRecord file; copy its *.tfrecord* files there")
    chosen = [shard for shard in shards if split in (None, shard.split)]
    if not chosen:
        there = ", ".join(sorted({shard.split for shard in shards}))
        raise DataError(f"{path} has no split {split!r}; it has {there}")
    return chosen


def _report_missing(shards: list[_Shard], report: Report) -> None:
    """Reports shards that the names of their neighbours promise."""
    present: dict[tuple[str, int], set[int]] = {}
    for shard in shards:
        match = _SHARD.fullmatch(shard.path.name)
        if match is not None and match["total"]:
            present.setdefault((match["name"], int(match["total"])), set()).add(int(match["number"]))
    for (name, total), numbers in present.items():
        if missing := sorted(set(range(total)) - numbers):
            listed = f"{missing[:5]}{' and more' * (len(missing) > 5)}"
            report(DataError(f"{shards[0].path.parent}/{name}: shards {listed} of {total} are missing"))
