"""RLDS data sets as TensorFlow Datasets writes them: features.json and TFRecord shards.

Steps are raw: step 0 is kept, so labels and images stay aligned. The metadata's flags and
descriptions (has_image_*, is_last, "joint velocities") are wrong in Bridge and are not used.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.data.images import choose_camera, decode_image, require_one_size
from vlm_local.data.states import convert_actions, convert_states
from vlm_local.data.tfrecord import count_records, decode_bytes, decode_floats, parse_example, read_records
from vlm_local.errors import DataError
from vlm_local.files import read_json_object
from vlm_local.types import Episode

_STATES = ("steps/observation/state", "steps/observation/proprio")
_INSTRUCTIONS = (
    "steps/language_instruction",
    "steps/observation/natural_language_instruction",
    "episode_metadata/language_instruction",
)
_ACTION = "steps/action"


@dataclass(frozen=True)
class _Columns:
    """Names of the features to read; state_width and action_width are numbers a step."""

    image: str
    state: str
    state_width: int
    action: str | None
    action_width: int
    instruction: str


def open_episodes(path: Path, camera: str | None, report: Callable[[DataError], None]) -> Iterator[Episode]:
    """Episodes of a folder with features.json (or of one TFRecord file in it), one record in memory.

    camera: name of an image feature, e.g. "image_0". Raises DataError where the data set has not what
    an episode needs; a broken record goes to `report`, and uses its index up.
    """
    folder = path if path.is_dir() else path.parent
    columns = _choose_columns(_load_features(folder / "features.json"), camera, folder)
    return _read_episodes(_list_shards(folder, report) if path.is_dir() else [path], columns, report)


def count_episodes(path: Path) -> int:
    """Records that the headers of all shards promise."""
    shards = _list_shards(path, lambda error: None) if path.is_dir() else [path]
    return sum(map(count_records, shards))


def _read_episodes(shards: list[Path], columns: _Columns, report: Callable[[DataError], None]) -> Iterator[Episode]:
    index = -1
    for shard in shards:
        for offset, data in read_records(shard, report):
            index += 1
            source = f"{shard}, byte {offset}"
            if data is None:
                continue
            try:
                yield _parse_episode(index, data, columns, source)
            except ValueError as error:
                report(DataError(f"{source}: not a record of this data set ({error})"))
            except DataError as error:
                report(error)


def _parse_episode(index: int, data: bytes, columns: _Columns, source: str) -> Episode:
    features = parse_example(data)
    missing = [name for name in (columns.state, columns.image, columns.instruction) if name not in features]
    if missing:
        raise DataError(f"{source}: the record lacks {', '.join(missing)}")
    states = convert_states(decode_floats(features[columns.state]).reshape(-1, columns.state_width), source)
    actions = None
    if columns.action in features:
        actions = convert_actions(decode_floats(features[columns.action]).reshape(-1, columns.action_width))
    images = decode_bytes(features[columns.image])
    instructions = decode_bytes(features[columns.instruction])
    if len(images) != len(states) or not (actions is None or len(actions) == len(states)):
        raise DataError(f"{source}: {len(states)} states, but {len(images)} images or another number of actions")

    def load_image(step: int) -> np.ndarray:
        return decode_image(bytes(images[step]), f"{source}, step {step}")

    instruction = str(instructions[0], "utf-8").strip() if instructions else ""
    return Episode(index, instruction, states, actions, require_one_size(load_image, source), source)


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
    return flat


def _choose_columns(features: Mapping[str, Mapping[str, Any]], camera: str | None, folder: Path) -> _Columns:
    images = {name.rpartition("/")[2]: name for name, node in features.items() if "image" in node}
    state = next((name for name in _STATES if name in features), None)
    instruction = next((name for name in _INSTRUCTIONS if name in features), None)
    image = images[choose_camera(images, camera, str(folder))]
    for name, candidates in ((state, _STATES), (instruction, _INSTRUCTIONS)):
        if name is None:
            raise DataError(f"{folder}/features.json has none of {', '.join(candidates)}; it has {', '.join(features)}")
    action = _ACTION if _ACTION in features else None
    action_width = _count_numbers(features[action], action, folder) if action else 0
    return _Columns(image, state, _count_numbers(features[state], state, folder), action, action_width, instruction)


def _count_numbers(node: Mapping[str, Any], name: str, folder: Path) -> int:
    """Numbers a step of a tensor feature."""
    tensor = node.get("tensor", {})
    dimensions = tensor.get("shape", {}).get("dimensions", [])
    if not tensor.get("dtype", "").startswith("float") or tensor.get("encoding", "none").lower() != "none":
        raise DataError(f"{folder}/features.json: {name} must be an unencoded tensor of floats, not {tensor or node}")
    return int(np.prod([int(size) for size in dimensions]))


def _list_shards(folder: Path, report: Callable[[DataError], None]) -> list[Path]:
    """The TFRecord files by name; a shard that its neighbours' names promise but is not there is reported."""
    shards = sorted(folder.glob("*.tfrecord*"))
    if not shards:
        raise DataError(f"{folder} has features.json but no TFRecord file; copy its *.tfrecord* files there")
    present: dict[tuple[str, int], set[int]] = {}
    for shard in shards:
        if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})", shard.name):
            present.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    for (name, total), numbers in present.items():
        if missing := sorted(set(range(total)) - numbers):
            report(DataError(f"{folder}/{name}: shards {missing} of {total} are missing"))
    return shards
