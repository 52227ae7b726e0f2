"""Labelled pictures for a success detector: AutoEval's record-*.pkl files, or a folder for each answer.

AutoEval's teleoperation and filter scripts write one pickled list for each answer, its name saying
which; the questions are those its detectors are trained with.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.data.autoeval import load_pickle
from vlm_local.data.images import MAX_IMAGE_BYTES, check_image, decode_image
from vlm_local.errors import DataError
from vlm_local.files import open_regular

_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Task:
    """question: in AutoEval's words. answers: beginning of a file's name -> the answer to its pictures."""

    question: str
    answers: dict[str, str]


TASKS = (
    Task("is the drawer open? answer yes or no", {"record-open-drawer": "yes", "record-close-drawer": "no"}),
    Task(
        "is the eggplant in the sink or in the basket? answer sink or basket or invalid",
        {"record-in-sink": "sink", "record-in-basket": "basket", "record-invalid": "invalid"},
    ),
    Task("is the cloth folded or unfolded? answer yes or no", {"record-folded": "yes", "record-unfolded": "no"}),
)


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """image: uint8 (H, W, 3) RGB. answer: the right one. source: file and place in it."""

    image: np.ndarray
    answer: str
    source: str


@dataclass(frozen=True)
class LabelledFolder:
    """question: AutoEval's own for its files, None for plain folders. choices: every answer there is."""

    question: str | None
    choices: tuple[str, ...]
    files: tuple[tuple[Path, str], ...]

    def open_images(self, report: Callable[[DataError], None]) -> Iterator[LabelledImage]:
        """One picture after the other; `report` is given each that cannot be read."""
        for path, answer in self.files:
            try:
                yield from (
                    _read_pickle(path, answer, report) if path.suffix == ".pkl" else [_read_picture(path, answer)]
                )
            except DataError as error:
                report(error)


def open_labelled(path: str | Path) -> LabelledFolder:
    """Raises DataError for a folder of neither kind, and for one in which there is nothing to tell apart."""
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    return _find_records(folder) or _find_classes(folder)


def _find_records(folder: Path) -> LabelledFolder | None:
    """AutoEval's files of one task; None where there are none."""
    found = {}
    for file in sorted(folder.glob("record*.pkl")):
        name = file.stem.lower().replace("_", "-")
        for task in TASKS:
            for beginning, answer in task.answers.items():
                if name.startswith(beginning):
                    found.setdefault(task.question, (task, []))[1].append((file, answer))
    if not found:
        return None
    if len(found) > 1:
        raise DataError(f"{folder} holds records of several tasks; keep each task's in a folder of its own")
    ((question, (task, files)),) = found.items()
    return LabelledFolder(question, tuple(dict.fromkeys(task.answers.values())), tuple(files))


def _find_classes(folder: Path) -> LabelledFolder:
    files = [
        (file, file.parent.name)
        for file in sorted(folder.glob("*/*"))
        if file.suffix.lower() in _PICTURES and not file.name.startswith(".")
    ]
    choices = tuple(dict.fromkeys(answer for _, answer in files))
    if len(choices) < 2:
        names = ", ".join(f"{name}*.pkl" for task in TASKS for name in task.answers)
        raise DataError(
            f"{folder} holds neither AutoEval's records ({names}) nor two or more folders of PNG or JPEG pictures, "
            "each named after the right answer to its pictures"
        )
    return LabelledFolder(None, choices, tuple(files))


def _read_picture(path: Path, answer: str) -> LabelledImage:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: {error}") from None
    return LabelledImage(decode_image(data, str(path)), answer, f"{path.parent.name}/{path.name}")


def _read_pickle(path: Path, answer: str, report: Callable[[DataError], None]) -> Iterator[LabelledImage]:
    steps = load_pickle(path)
    if not isinstance(steps, list):
        raise DataError(f"{path}: expected a list of steps as AutoEval records them, got {type(steps).__name__}")
    for index, step in enumerate(steps):
        source = f"{path.name}, step {index}"
        try:
            yield LabelledImage(_read_step(step, source), answer, source)
        except DataError as error:
            report(error)


def _read_step(step: Any, source: str) -> np.ndarray:
    try:
        image = step["observation"]["image_primary"]
        image = image[-1] if image.ndim == 4 else image  # a history of frames; the last is now
    except (TypeError, LookupError, AttributeError):
        raise DataError(f"{source}: expected observation, image_primary in it, as AutoEval records them") from None
    if image.dtype.kind == "f" and image.size and image.min() >= 0 and image.max() <= 1:
        image = np.rint(255 * image).astype(np.uint8)  # as filter_images.py writes them
    return check_image(image, source)
