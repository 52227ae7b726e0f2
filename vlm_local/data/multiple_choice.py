"""Multiple-choice questions about pictures, in the TSV files of VLMEvalKit, in which many benchmarks can be had.

A row is a question. Columns: index; image, a file in base64, a list of such, or the index of the row that has them; or
image_path in place of image, beside the TSV file; question; the choices in A, B, C ..., or a list of them in options,
none where the answer is yes or no; answer, a choice's letter; and, where the benchmark has them, hint and category.
"""

import ast
import base64
import csv
import hashlib
import json
import string
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TextIO

import numpy as np

from vlm_local.data.images import decode_image, read_image
from vlm_local.errors import DataError, Report

MAX_PICTURES = 32
_MAX_FIELD = 2**31 - 1  # the most that csv takes on every system
_MAX_INDEX = 64  # a longer field is a picture
_YES_OR_NO = ("Yes", "No")
_NOTHING = ("nan", "NaN", "<NA>")  # an empty cell, where pandas made a text of it; "None" is an answer to "How many?"
_NEEDED = ("index", "question", "answer")


@dataclass(frozen=True, eq=False)
class ChoiceQuestion:
    """index: the benchmark's own name of the question. pictures: uint8 (H, W, 3) each, in the order of the question.

    options: the choices by letter; empty where the answer is yes or no. label: the right one of `answers`.
    """

    index: str
    pictures: tuple[np.ndarray, ...]
    question: str
    options: Mapping[str, str]
    label: str
    category: str

    @property
    def answers(self) -> tuple[str, ...]:
        """Those that can be given: the letters, or yes and no."""
        return tuple(self.options) or _YES_OR_NO

    @property
    def text(self) -> str:
        """What a model is asked."""
        if not self.options:
            return f"{self.question}\nAnswer Yes or No."
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in self.options.items())
        return f"{self.question}\n{listed}\nAnswer with the letter of the right choice."

    @cached_property
    def sha256(self) -> str:
        """Of the pictures."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(repr(picture.shape).encode() + picture.tobytes())
        return digest.hexdigest()


def open_questions(path: Path, report: Report) -> Iterator[ChoiceQuestion]:
    """One question after the other; `report` is given each that cannot be asked, such as one without an answer.

    Raises DataError for a file of another kind.
    """
    pictures, seen = _read_shared(path), set()
    for row in _read_rows(path):
        source = f"{path.name}, index {row['index'][:_MAX_INDEX]}"
        try:
            if row["index"] in seen:
                raise DataError(f"{source}: another row has this index")
            seen.add(row["index"])
            yield _read_question(row, pictures, path.parent, source)
        except DataError as error:
            report(error)


def count_questions(path: Path) -> int:
    """Rows of the file. Raises DataError for a file of another kind."""
    return sum(1 for _ in _read_rows(path))


def hash_file(path: Path) -> str:
    """sha256 of the file, by which others know whether theirs is the same."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _read_rows(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(_MAX_FIELD)  # the module's own limit is 128 kB; a picture is longer
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_table(file, path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no TSV file of questions: {error}") from None


def _read_table(file: TextIO, path: Path) -> Iterator[dict[str, str]]:
    """Cells by the names of their columns. Refuses a file in which they would get into others, as pandas does."""
    rows = csv.reader(file, csv.excel_tab, strict=True)  # else a quote that does not end takes in all rows behind it
    try:
        names = next(rows, [])
        if twice := [name for name in dict.fromkeys(names) if name and names.count(name) > 1]:
            raise DataError(f"{path} has several columns {twice[0]!r}; which of them counts cannot be told")
        missing = [name for name in _NEEDED if name not in names]
        if missing or not {"image", "image_path"} & set(names):
            raise DataError(
                f"{path} has no column {missing[0] if missing else 'image'}; expected a TSV file of VLMEvalKit: "
                "index, image, question, A, B, ..., answer"
            )
        for cells in filter(None, rows):
            if len(cells) > len(names):
                raise csv.Error(f"{len(cells)} cells in {len(names)} columns, so some text lacks its quotes")
            yield dict.fromkeys(names, "") | dict(zip(names, map(_clean, cells), strict=False))
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}") from None


def _clean(cell: str) -> str:
    text = cell.strip()
    return "" if text in _NOTHING else text


def _read_shared(path: Path) -> dict[str, str]:
    """The image fields of rows that other rows name, by index."""
    rows = ((row["index"], row.get("image", "")) for row in _read_rows(path))
    wanted = {image for _, image in rows if 0 < len(image) <= _MAX_INDEX}
    if not wanted:
        return {}
    return {row["index"]: row["image"] for row in _read_rows(path) if row["index"] in wanted}


def _read_question(row: Mapping[str, str], shared: Mapping[str, str], folder: Path, source: str) -> ChoiceQuestion:
    choices = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
    if not choices:
        listed = _split(row.get("options", ""), source)
        if len(listed) > len(string.ascii_uppercase):
            raise DataError(f"{source}: {len(listed)} choices; there are letters for {len(string.ascii_uppercase)}")
        choices = {letter: text for letter, text in zip(string.ascii_uppercase, listed, strict=False) if text}
    question = "\n".join(filter(None, (row.get("hint"), row["question"])))
    if not row["question"] or len(choices) == 1:
        raise DataError(f"{source}: expected a question with two choices or more, or none where it is yes or no")
    label = _find_label(row["answer"], choices, source)
    pictures = tuple(_read_pictures(row, shared, folder, source))
    return ChoiceQuestion(row["index"], pictures, question, choices, label, row.get("category") or "-")


def _find_label(answer: str, choices: Mapping[str, str], source: str) -> str:
    """The choice that is meant: by its letter, else by its words, else by its number, where no other has the same."""
    answers, said = tuple(choices) or _YES_OR_NO, answer.casefold()
    named = [each for each in answers if each.casefold() in (said, said.strip("()."))]
    meant = named or [letter for letter, words in choices.items() if words.casefold() == said]
    if not meant and (number := _read_number(said)) is not None:
        meant = [letter for letter, words in choices.items() if _read_number(words) == number]
    if len(meant) != 1:
        raise DataError(f"{source}: the right answer is {answer[:40]!r}; expected one of {', '.join(answers)}")
    return meant[0]


def _read_number(text: str) -> float | None:
    """pandas writes the numbers of a column with an empty cell as 3.0, and those of another as 3."""
    try:
        return float(text)
    except ValueError:
        return None


def _read_pictures(row: Mapping[str, str], shared: Mapping[str, str], folder: Path, source: str) -> list[np.ndarray]:
    field = row.get("image", "")
    field = shared.get(field, field)
    if field and len(field) <= _MAX_INDEX:
        raise DataError(f"{source}: image names the row {field}, which is not there or has no picture")
    parts = _split(field or row.get("image_path", ""), source)
    if not 1 <= len(parts) <= MAX_PICTURES:
        raise DataError(f"{source}: {len(parts)} pictures; expected 1 to {MAX_PICTURES}")
    if field:
        return [_decode(part, source) for part in parts]
    paths = [(folder / part).resolve() for part in parts]
    if outside := [path for path in paths if not path.is_relative_to(folder.resolve())]:
        raise DataError(f"{source}: {outside[0]} is not in the folder of the TSV file; copy the pictures there")
    return [read_image(path, any_colours=True) for path in paths]


def _split(field: str, source: str) -> list[str]:
    """The parts of a list, which is written as JSON or as Python writes it; else the field itself."""
    if not field.startswith("["):
        return [field] if field else []
    parts = None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            parts = parse(field)
            break
    if not isinstance(parts, list) or not all(isinstance(part, str | int | float) for part in parts):
        raise DataError(f"{source}: a list of texts was expected, not {field[:40]!r}")
    return [_clean(str(part)) for part in parts]


def _decode(text: str, source: str) -> np.ndarray:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        raise DataError(f"{source}: a picture in base64 was expected ({error})") from None
    return decode_image(data, source, any_colours=True)
