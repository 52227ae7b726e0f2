"""Labelled pictures for a success detector: AutoEval's pickles, a person's labels.jsonl, or a folder for each answer.

AutoEval's teleoperation writes record-*.pkl, one pickled list for each answer, its name saying which; the questions are
those its detectors are trained with. Its filter_images.py writes positives.pkl and negatives.pkl, "yes" and "no" to a
question that they do not name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.data.autoeval import load_pickle
from vlm_local.data.corrections import LABELS, list_logged, read_corrections
from vlm_local.data.images import check_image, read_image
from vlm_local.errors import DataError, Report

_PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Task:
    """question: in AutoEval's words. answers: beginning of a file's name -> the answer to its pictures.

    orders: the instructions of jobs in which this is asked.
    """

    question: str
    answers: dict[str, str]
    orders: tuple[str, ...]

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.answers.values()))


TASKS = (
    Task(
        "is the drawer open? answer yes or no",
        {"record-open-drawer": "yes", "record-close-drawer": "no"},
        ("open the drawer", "close the drawer"),
    ),
    Task(
        "is the eggplant in the sink or in the basket? answer sink or basket or invalid",
        {"record-in-sink": "sink", "record-in-basket": "basket", "record-invalid": "invalid"},
        ("put the eggplant in the blue sink", "put the eggplant in the yellow basket"),
    ),
    Task(
        "is the cloth folded or unfolded? answer yes or no",
        {"record-folded": "yes", "record-unfolded": "no"},
        ("fold the cloth from top right to bottom left",),
    ),
)
_FILTERED = {"positives.pkl": "yes", "negatives.pkl": "no"}


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """image: uint8 (H, W, 3) RGB. answer: the right one. source: file and place in it.

    episode: of the recording that it is a frame of; a picture that was taken alone is an episode of its own.
    """

    image: np.ndarray
    answer: str
    source: str
    episode: str


@dataclass(frozen=True)
class LabelledFolder:
    """question: None where nothing in the folder tells. choices: every answer there is.

    files: with the answer to their pictures. is_bgr: whether pictures of numbers from 0 to 1 have blue first. problems:
    what was left out already.
    """

    question: str | None
    choices: tuple[str, ...]
    files: tuple[tuple[Path, str], ...]
    is_bgr: bool = False
    problems: tuple[DataError, ...] = ()

    def open_images(self, report: Report) -> Iterator[LabelledImage]:
        """One picture after the other; `report` is given each that cannot be read."""
        for problem in self.problems:
            report(problem)
        for path, answer in self.files:
            try:
                if path.suffix == ".pkl":
                    yield from self._read_pickle(path, answer, report)
                else:
                    yield _read_picture(path, answer)
            except DataError as error:
                report(error)

    def _read_pickle(self, path: Path, answer: str, report: Report) -> Iterator[LabelledImage]:
        steps = load_pickle(path)
        if not isinstance(steps, list):
            raise DataError(f"{path}: expected a list of steps as AutoEval records them, got {type(steps).__name__}")
        episode = 0
        for index, step in enumerate(steps):
            source = f"{path.name}, step {index}"
            try:
                image, is_filtered = _read_step(step, source)
            except DataError as error:
                report(error)
            else:
                image = image[..., ::-1].copy() if is_filtered and self.is_bgr else image
                # What filter_images.py puts together are single pictures, a rollout apart.
                recording = source if is_filtered else f"{path.name}, episode {episode}"
                yield LabelledImage(image, answer, source, recording)
            episode += _ends_episode(step)


def open_labelled(path: str | Path, is_bgr: bool = False, question: str | None = None) -> LabelledFolder:
    """is_bgr: of what filter_images.py wrote before 2026-01-29, which nothing in its files tells.

    question: which one, where a folder holds the answers to several. Raises DataError for a folder of no known kind,
    and for one in which there is nothing to tell apart.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}")
    if (folder / LABELS).exists():
        return _find_corrected(folder, question)
    recorded = _find_pickles(folder, is_bgr)
    if recorded is not None:
        return recorded
    if list_logged(folder):
        raise DataError(
            f"{folder} holds pictures of AutoEval's detector that nobody has labelled. Its True and False say whether "
            f"a call was satisfied, also after a reset, and not what the picture shows: label them with `view {folder}`"
        )
    return _find_classes(folder)


def find_asked(folder: Path) -> Task | None:
    """What AutoEval's detector was asked in the job of a --save_classifier_data folder, by the folder's name."""
    name = folder.name.replace("_", " ")
    return next((task for task in TASKS if any(order in name for order in task.orders)), None)


def _find_corrected(folder: Path, question: str | None) -> LabelledFolder:
    problems: list[DataError] = []
    corrections = read_corrections(folder, problems.append)
    chosen = [each for each in corrections.values() if question in (None, each.question)]
    if len({(each.question, each.choices) for each in chosen}) != 1:
        known = "; ".join(sorted({each.question for each in corrections.values()}))
        raise DataError(f"{folder / LABELS} answers no question, or several: {known}; name one of them with --question")
    files = tuple((folder / each.picture, each.answer) for each in chosen)
    return LabelledFolder(chosen[0].question, chosen[0].choices, files, problems=tuple(problems))


def _find_pickles(folder: Path, is_bgr: bool) -> LabelledFolder | None:
    """AutoEval's record-*.pkl, and what filter_images.py put beside them; None where there is neither."""
    records = _find_records(folder, is_bgr)
    filtered = tuple((folder / name, answer) for name, answer in _FILTERED.items() if (folder / name).exists())
    if records is None:
        return LabelledFolder(None, tuple(_FILTERED.values()), filtered, is_bgr) if filtered else None
    if filtered and set(records.choices) != set(_FILTERED.values()):
        raise DataError(
            f"{filtered[0][0]} says yes or no, but the records beside it answer {', '.join(records.choices)}: rename "
            f"it after the answer, such as {next(iter(TASKS[1].answers))}-2.pkl"
        )
    return replace(records, files=(*records.files, *filtered))


def _find_records(folder: Path, is_bgr: bool) -> LabelledFolder | None:
    """AutoEval's files of one task; None where there are none."""
    found: dict[str, tuple[Task, list[tuple[Path, str]]]] = {}
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
    return LabelledFolder(question, task.choices, tuple(files), is_bgr)


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
            f"{folder} holds neither AutoEval's pickles ({names}, {', '.join(_FILTERED)}), nor {LABELS}, nor two or "
            "more folders of PNG or JPEG pictures, each named after the right answer to its pictures"
        )
    return LabelledFolder(None, choices, tuple(files))


def _read_picture(path: Path, answer: str) -> LabelledImage:
    source = f"{path.parent.name}/{path.name}"
    return LabelledImage(read_image(path), answer, source, source)


def _ends_episode(step: Any) -> bool:
    done = step.get("done") if isinstance(step, dict) else None
    return isinstance(done, int | np.bool_) and bool(done)


def _read_step(step: Any, source: str) -> tuple[np.ndarray, bool]:
    """The picture, and whether filter_images.py wrote it, which writes numbers from 0 to 1."""
    try:
        image = step["observation"]["image_primary"]
        image = image[-1] if image.ndim == 4 else image  # a history of frames; the last is now
    except (TypeError, LookupError, AttributeError):
        raise DataError(f"{source}: expected observation, image_primary in it, as AutoEval records them") from None
    is_filtered = bool(image.dtype.kind == "f" and image.size and image.min() >= 0 and image.max() <= 1)
    return check_image(np.rint(255 * image).astype(np.uint8) if is_filtered else image, source), is_filtered
