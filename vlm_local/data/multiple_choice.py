"""Multiple-choice questions about pictures, in the TSV files of VLMEvalKit, in which many benchmarks can be had.

A row is a question. Columns: index; image, a file in base64, a list of such, or the index of the row that has them; or
image_path in place of image, beside the TSV file; question; the choices in A, B, C ..., or a list of them in options,
none where the answer is yes or no; answer, a choice's letter; and, where the benchmark has them, hint and category.
"""

import ast
import base64
import csv
import hashlib
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlm_local.data.images import decode_image, read_image
from vlm_local.errors import DataError, Report

MAX_PICTURES = 32
_MAX_FIELD = 2**31 - 1  # the most that csv takes on every system
_MAX_INDEX = 64  # a longer field is a picture
_YES_OR_NO = ("Yes", "No")
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
            rows = csv.DictReader(file, dialect=csv.excel_tab, restval="", restkey="")
            names = set(rows.fieldnames or ())
            missing = [name for name in _NEEDED if name not in names]
            if missing or not {"image", "image_path"} & names:
                raise DataError(
                    f"{path} has no column {missing[0] if missing else 'image'}; expected a TSV file of VLMEvalKit: "
                    "index, image, question, A, B, ..., answer"
                )
            yield from rows
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no TSV file of questions: {error}") from None


def _read_shared(path: Path) -> dict[str, str]:
    """The image fields of rows that other rows name, by index."""
    rows = ((row["index"], row.get("image", "")) for row in _read_rows(path))
    wanted = {image for _, image in rows if 0 < len(image) <= _MAX_INDEX}
    if not wanted:
        return {}
    return {row["index"]: row["image"] for row in _read_rows(path) if row["index"] in wanted}


def _read_question(row: Mapping[str, str], shared: Mapping[str, str], folder: Path, source: str) -> ChoiceQuestion:
    options = {letter: text.strip() for letter in string.ascii_uppercase if (text := row.get(letter) or "").strip()}
    listed = [] if options else _split(row.get("options") or "", source)
    options |= zip(string.ascii_uppercase, listed, strict=False)
    question = "\n".join(filter(None, ((row.get(name) or "").strip() for name in ("hint", "question"))))
    if not question or len(options) == 1:
        raise DataError(f"{source}: expected a question with two choices or more, or none where it is yes or no")
    answers = tuple(options) or _YES_OR_NO
    by_letter = {answer.casefold(): answer for answer in answers}
    by_words = {words.casefold(): letter for letter, words in options.items()}
    said = row["answer"].strip().casefold()
    label = (by_words | by_letter).get(said) or by_letter.get(said.strip("()."))
    if label is None:
        raise DataError(f"{source}: the right answer is {row['answer'][:40]!r}; expected one of {', '.join(answers)}")
    category = (row.get("category") or "").strip() or "-"
    pictures = tuple(_read_pictures(row, shared, folder, source))
    return ChoiceQuestion(row["index"], pictures, question, options, label, category)


def _read_pictures(row: Mapping[str, str], shared: Mapping[str, str], folder: Path, source: str) -> list[np.ndarray]:
    field = row.get("image") or ""
    field = shared.get(field, field)
    if field and len(field) <= _MAX_INDEX:
        raise DataError(f"{source}: image names the row {field}, which is not there or has no picture")
    parts = _split(field or row.get("image_path") or "", source)
    if not 1 <= len(parts) <= MAX_PICTURES:
        raise DataError(f"{source}: {len(parts)} pictures; expected 1 to {MAX_PICTURES}")
    if field:
        return [_decode(part, source) for part in parts]
    paths = [(folder / part).resolve() for part in parts]
    if outside := [path for path in paths if not path.is_relative_to(folder.resolve())]:
        raise DataError(f"{source}: {outside[0]} is not in the folder of the TSV file; copy the pictures there")
    return [read_image(path, any_colours=True) for path in paths]


def _split(field: str, source: str) -> list[str]:
    """The parts of a list, which is written as Python writes it; else the field itself."""
    if not field.startswith("["):
        return [field] if field else []
    try:
        parts = ast.literal_eval(field)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        parts = None
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise DataError(f"{source}: a list of texts was expected, not {field[:40]!r}")
    return parts


def _decode(text: str, source: str) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise DataError(f"{source}: a picture in base64 was expected ({error})") from None
    return decode_image(data, source, any_colours=True)
