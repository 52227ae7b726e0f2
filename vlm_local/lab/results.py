"""The result folder of a study: who may write into it, how a study goes on, and which of its files are evidence.

One rule for all studies: the same command goes on where it was stopped. It may ask for more than the last time
(episodes, tasks, scenes). Any other setting that decides the results must be the same; the refusal names those that are
not. A folder that holds no result yet may be begun anew with other settings, so that a typo does not spoil it. A
command that fails before its first result removes the files that it made.
"""

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError, DataError
from vlm_local.files import (
    encode_json,
    list_missing,
    lock_folder,
    open_replacing,
    read_json_lines,
    read_json_object,
    remove_unused,
    write_json,
)
from vlm_local.provenance import join_parts, list_differences

Settings = Mapping[str, Any]
_SHOWN = 3  # settings that a refusal names


class ResultFolder:
    """The --out folder of a study, held for this process until it is closed.

    settings: the object in its settings file, as `begin` and `update` wrote it.
    """

    def __init__(self, path: Path, study: str, settings_name: str):
        """path: made where missing. study: name of the command. settings_name: of the settings file.

        Raises ConfigError where another process holds the folder, or it holds something else than a result of `study`.
        """
        self.path = path
        self.settings: dict[str, Any] = {}
        self._study = study
        self._settings_path = path / settings_name
        # What a kill leaves behind before the settings are written is no result: empty files, and theirs half written.
        half_written = f"{settings_name}.new"
        is_free = not path.exists() or (
            path.is_dir() and all(entry.name == half_written or _is_empty_file(entry) for entry in path.iterdir())
        )
        if not is_free and not self._settings_path.is_file():
            raise ConfigError(f"{path} holds something else than a result of `{study}`; choose another --out")
        self._made = list_missing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}; choose another --out") from None
        self._lock = lock_folder(path)

    def __enter__(self) -> "ResultFolder":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        """Raises DataError for an error of the disk, such as one that is full."""
        self._lock.close()
        if error is not None:
            remove_unused(self._made, (self._settings_path.name,))
        if isinstance(error, OSError):
            raise DataError(f"{self.path}: {error}; the same command goes on once it is mended") from error

    def begin(
        self, here: Settings, decide: Callable[[Settings], Settings], has_results: bool, grows: tuple[str, ...] = ()
    ) -> None:
        """Write the settings file of a result that begins, or check that it goes on as it began.

        here: what the result says of itself now. decide: picks the settings that may not change. has_results: whether
        the folder holds any; if not, `here` takes the place of what the file says. grows: names in `here` that may
        change, and whose new values are kept. Parts that were made with other versions or on another machine are
        listed in "continued_with". Raises ConfigError where a setting differs.
        """
        here = dict(json.loads(encode_json(here)))
        if self._settings_path.exists():
            there = self._read()
            try:
                differences = list(list_differences(decide(there), decide(here)))
            except (AttributeError, KeyError, TypeError) as error:
                raise self._refuse(repr(error)) from None
            if has_results and differences:
                more = [f"and {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
                told = "; ".join(differences[:_SHOWN] + more)
                raise ConfigError(f"{self.path} holds a result with other settings: {told}; choose another --out")
            if has_results:
                here = here | join_parts(there, here) | {name: here[name] for name in grows}
        self.settings = here
        write_json(self._settings_path, here)

    def update(self, **fields: Any) -> None:
        """Replace fields of the settings file."""
        self.settings |= json.loads(encode_json(fields))
        write_json(self._settings_path, self.settings)

    def _read(self) -> dict[str, Any]:
        try:
            there = json.loads(self._settings_path.read_bytes())
        except ValueError as error:
            raise self._refuse(str(error)) from None
        if not isinstance(there, dict):
            raise self._refuse(f"it holds a {type(there).__name__}")
        return there

    def _refuse(self, why: str) -> ConfigError:
        return ConfigError(f"{self._settings_path} is of no result of `{self._study}` ({why}); choose another --out")


def _is_empty_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


class RowFile:
    """A JSON-lines file to which rows are appended, each flushed at once. Threads may share it.

    rows: those that were there when it was opened, in order. A last line that a kill cut off is dropped then.
    """

    def __init__(self, path: Path, keep: Callable[[Mapping[str, Any]], bool] = lambda row: True):
        """keep: which rows of before stay. Raises DataError for a whole line that is no JSON object."""
        torn: list[int] = []
        try:
            before = list(read_json_lines(path, torn.append)) if path.exists() else []
            self.rows: list[dict[str, Any]] = [row for row in before if keep(row)]
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: {error}; something else changed the file, so choose another --out") from None
        self._path = path
        if torn or len(self.rows) < len(before):
            self._rewrite(self.rows)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            self._file.write(encode_json(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()

    def sort(self, key: Callable[[Mapping[str, Any]], Any]) -> None:
        """Put the rows of a closed file in order: work in parallel adds them as they come."""
        rows = list(read_json_lines(self._path))
        ordered = sorted(rows, key=key)
        if rows != ordered:
            self._rewrite(ordered)

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        with open_replacing(self._path) as file:
            file.writelines(encode_json(row) + "\n" for row in rows)


@dataclass(frozen=True)
class Layout:
    """One kind of result. needs: files without which it is none. texts, pictures: patterns of relative paths.

    marks: a file and a key of its JSON object that only this kind has.
    """

    kind: str
    needs: tuple[str, ...]
    marks: tuple[str, str]
    texts: str
    pictures: str

    def holds(self, name: str) -> bool:
        """Whether a file of this relative path belongs to such a result; nothing outside the folder does."""
        return bool(re.fullmatch(f"{self.texts}|{self.pictures}", name))

    def is_picture(self, name: str) -> bool:
        return bool(re.fullmatch(self.pictures, name))


_NONE = r"(?!)"  # matches no path
_STUDIES = (
    Layout(
        kind="eval",
        needs=("evaluation.json", "episodes.jsonl", "rows.jsonl", "report.json"),
        marks=("evaluation.json", "plan"),
        texts=r"(evaluation|report)\.json|(episodes|rows)\.jsonl",
        pictures=_NONE,
    ),
    Layout(
        kind="sim",
        needs=("meta.json", "report.json"),
        marks=("meta.json", "simulator"),
        texts=r"(meta|report)\.json|episodes/[a-z0-9_-]+-[0-9]+/(meta\.json|steps\.jsonl)",
        pictures=r"episodes/[a-z0-9_-]+-[0-9]+/(frames/[0-9]{6}\.png|film\.(mp4|gif))",
    ),
    Layout(
        kind="spatial",
        needs=("study.json", "rows.jsonl", "report.json"),
        marks=("study.json", "set"),
        texts=r"(study|report|set)\.json|(rows|reasoning)\.jsonl",
        pictures=_NONE,  # its set draws them again
    ),
)
_PARTS = "|".join(f"{layout.kind}/({layout.texts})" for layout in _STUDIES)
_CHECKUP = Layout(
    kind="doctor",
    needs=("doctor.json", "report.json"),
    marks=("doctor.json", "checkup"),
    texts=rf"(doctor|report)\.json|stages/[a-z]+\.json|pictures\.jsonl|{_PARTS}",
    pictures=_NONE,
)
_CHOICES = Layout(  # no part of a checkup
    kind="eval-choices",
    needs=("questions.json", "rows.jsonl", "report.json"),
    marks=("questions.json", "data_sha256"),
    texts=r"(questions|report)\.json|rows\.jsonl",
    pictures=_NONE,  # they are the benchmark's
)
LAYOUTS = {layout.kind: layout for layout in (*_STUDIES, _CHOICES, _CHECKUP)}


def find_layout(folder: Path, kinds: Sequence[str] = tuple(LAYOUTS)) -> Layout:
    """Raises DataError for a folder that holds no finished result of these kinds."""
    for layout in (layout for kind, layout in LAYOUTS.items() if kind in kinds):
        name, key = layout.marks
        try:
            marked = key in read_json_object(folder / name)
        except (OSError, ValueError):
            continue
        missing = [name for name in layout.needs if not (folder / name).is_file()]
        if marked and not missing:
            return layout
        if marked:
            raise DataError(f"{folder} is a result of `{layout.kind}` without {', '.join(missing)}; finish it first")
    raise DataError(f"{folder} is no result folder; expected the --out of {', '.join(kinds)}")
