"""Pictures that a person has judged: labels.jsonl beside them, which the live page writes and training reads.

A line is {"picture", "question", "choices", "answer", "time"}; the last line about a picture counts. The pictures are
those that a server was asked about, or those of AutoEval's --save_classifier_data: N_img.png and N_success.txt, which
says whether the N-th call was satisfied. Calls after a reset expect the opposite answer, and nothing in the folder
tells them from the others. So an answer cannot be read from it; a person has to look.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_local.errors import DataError, Report
from vlm_local.files import append_whole, encode_json, open_regular, read_foreign_json_lines

LABELS = "labels.jsonl"
_LOGGED = re.compile(r"(\d{1,9})_img\.png")
_MAX_VERDICT = 200  # characters of N_success.txt


@dataclass(frozen=True)
class Correction:
    """picture: a file's name in the folder. answer: one of the choices."""

    picture: str
    question: str
    choices: tuple[str, ...]
    answer: str


def add_correction(folder: Path, correction: Correction) -> None:
    """Append a line. Raises OSError (a full disk); nothing of it is there then."""
    line = {**vars(correction), "time": time.time()}
    with (folder / LABELS).open("ab", buffering=0) as file:
        append_whole(file, (encode_json(line) + "\n").encode())


def read_corrections(folder: Path, report: Report) -> dict[str, Correction]:
    """What was said last of each picture, by the picture's name; a line that is none goes to `report`."""
    found = {}
    try:
        for line in read_foreign_json_lines(folder / LABELS, lambda said: report(DataError(said))):
            try:
                correction = _check(line)
            except (TypeError, LookupError, ValueError) as error:
                report(DataError(f"{folder / LABELS}: {str(line)[:200]} is no label of a picture ({error})"))
            else:
                found[correction.picture] = correction
    except OSError as error:
        raise DataError(f"{folder / LABELS}: {error.strerror}") from None
    return found


def _check(line: Any) -> Correction:
    texts = [line[name] for name in ("picture", "question", "answer")]
    choices = line["choices"]
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in (*texts, *choices)):
        raise ValueError("picture, question and answer are text, choices a list of it")
    picture, question, answer = texts
    if Path(picture).name != picture:
        raise ValueError("the picture is a file in the same folder")
    if answer not in choices:
        raise ValueError("the answer is one of the choices")
    return Correction(picture, question, tuple(choices), answer)


@dataclass(frozen=True)
class LoggedPicture:
    """One call of AutoEval's detector. said: "True" or "False" as a rule, None where the file is missing."""

    name: str
    said: str | None


def list_logged(folder: Path) -> Sequence[LoggedPicture]:
    """The pictures of a --save_classifier_data folder in the order of the calls; none in another folder."""
    numbers = {int(match[1]): path for path in folder.glob("*_img.png") if (match := _LOGGED.fullmatch(path.name))}
    return [
        LoggedPicture(path.name, _read_verdict(folder / f"{number}_success.txt"))
        for number, path in sorted(numbers.items())
    ]


def list_logs(parent: Path) -> list[Path]:
    """--save_classifier_data folders in `parent`, or `parent` itself where it is one."""
    if list_logged(parent):
        return [parent]
    return sorted(folder for folder in parent.glob("*") if folder.is_dir() and list_logged(folder))


def _read_verdict(path: Path) -> str | None:
    try:
        with open_regular(path) as file:
            return file.read(_MAX_VERDICT).decode("utf-8", "replace").strip()
    except OSError:
        return None
