"""Recorded robot data of every known format -> Episode. No scoring.

Readers stream: memory holds one record, not the data set.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from vlm_local.data.hub import download_data_set, parse_repository
from vlm_local.data.selection import DataSet, Selection
from vlm_local.errors import ConfigError, DataError, Report, refuse
from vlm_local.types import Episode

EVERYTHING = Selection()
_SHARD_NAME = r"\.tfrecord(-\d{5}-of-\d{5})?$"
_MAX_NEAR = 5  # data sets named in a message
_DEPTH = 3  # a data set's folder may lie this far below the path given, e.g. name/1.0.0


def open_data_set(path: str | Path, selection: Selection = EVERYTHING, report: Report = refuse) -> DataSet:
    """An RLDS or LeRobot data set, a run folder, or pickled trajectories; lerobot:ORG/NAME is one on the hub.

    report: is given every record that cannot be read, and raises unless told otherwise. Raises DataError at once for
    a path of no known format, a camera or split that is not there, states of an unknown layout, or no instructions.
    """
    folder, reader = _find_reader(Path(path))
    return reader.open_data_set(folder, selection, report)


def open_episodes(path: str | Path, camera: str | None = None, report: Report = refuse) -> Iterator[Episode]:
    """The episodes of `open_data_set`, all splits, in reading order."""
    return open_data_set(path, Selection(camera), report).episodes


def count_episodes(path: str | Path, split: str | None = None) -> int:
    """How many episodes `open_data_set` will come to, broken ones included. Reads no data."""
    folder, reader = _find_reader(Path(path))
    return reader.count_episodes(folder, split)


def find_lerobot(path: str | Path) -> Path:
    """The folder of a LeRobot data set at or below `path`. Raises DataError where it is of another format."""
    folder, reader = _find_reader(Path(path))
    if reader.__name__ != f"{__name__}.lerobot":
        raise DataError(f"{folder} is no LeRobot data set")
    return folder


def _find_reader(path: Path) -> tuple[Path, ModuleType]:
    """The folder that holds the data set, and the module of its format."""
    repository = parse_repository(path)
    if repository is not None:
        path = download_data_set(repository)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    for folder in _candidates(path):
        name = _recognise(folder)
        if name is not None:
            try:
                return folder, importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                raise ConfigError(f"reading {folder} needs {error.name}: .venv/bin/pip install -e .") from None
    raise DataError(
        f"{path} is of no known format; expected a folder with features.json (RLDS), meta/info.json (LeRobot), "
        f"episodes/ (a recorded run), or .pkl files (AutoEval){_describe_near(path)}"
    )


def _candidates(path: Path) -> Iterator[Path]:
    """`path`, and below it folders while there is a single way down."""
    yield path
    for _ in range(_DEPTH if path.is_dir() else 0):
        below = [child for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")]
        if len(below) != 1:
            return
        (path,) = below
        yield path


def _describe_near(path: Path) -> str:
    """Names data sets around and below `path`, one of which may be meant."""
    marks = ("features.json", "meta/info.json")
    around = [folder for folder in path.absolute().parents if any((folder / mark).is_file() for mark in marks)]
    folders = (child for level in ("*", "*/*") for child in sorted(path.glob(level)) if child.is_dir())
    below = filter(_recognise, folders)
    near = [*around, *below]
    listed = ", ".join(map(str, near[:_MAX_NEAR])) + ", ..." * (len(near) > _MAX_NEAR)
    return f". Data sets near it, one of which may be meant: {listed}" if near else ""


def _recognise(path: Path) -> str | None:
    """Name of the module that reads `path`."""
    if (path / "features.json").is_file() or (path.is_file() and re.search(_SHARD_NAME, path.name)):
        return "rlds"
    if (path / "meta" / "info.json").is_file():
        return "lerobot"
    if (path / "episodes").is_dir() and (path / "meta.json").is_file():
        return "runs"
    if path.suffix == ".pkl" or any(path.glob("*.pkl")) or any(path.glob("*/*.pkl")):
        return "autoeval"
    return None
