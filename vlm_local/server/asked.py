"""What a detector was asked, for a person to correct: the newest questions of this server, or AutoEval's logged ones.

A correction is a line of labels.jsonl beside the picture, which `train detector` and `eval-answers` read.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flask import Flask, Response, request

from vlm_local.answers import MAX_CHOICE, Answer, Question
from vlm_local.data.corrections import LABELS, Correction, add_correction, list_logged, read_corrections
from vlm_local.data.images import encode_file
from vlm_local.data.questions import Task, find_asked
from vlm_local.errors import DataError, RequestError
from vlm_local.fields import check_text
from vlm_local.server.service import send_json
from vlm_local.wire import load_request

FOLDER = "answers"  # of a run
KEPT = 32  # questions, as long as their pictures together take no more than MAX_BYTES
MAX_BYTES = 2**26


class Asked(Protocol):
    """Questions with their pictures, each known by a name. Any thread may call it."""

    @property
    def place(self) -> str:
        """Where corrections go, for people."""
        ...

    def list_questions(self) -> list[dict[str, Any]]:
        """Of each "id", "question", "choices", "said" (a text) and "label", the corrected answer or None."""
        ...

    def encode_picture(self, name: str) -> bytes:
        """PNG. Raises RequestError (404) for a name that is not listed."""
        ...

    def correct(self, name: str, answer: str) -> None:
        """Raises RequestError where that cannot be."""
        ...


@dataclass(eq=False)
class _Kept:
    question: Question
    answer: Answer
    label: str | None = None
    picture: str | None = None  # its file


class RecentAnswers:
    """The newest questions of this server. Nothing is written before a person says what is right."""

    def __init__(self, run: Path | None):
        """run: the folder that is recorded to, None when recording is off."""
        self._folder = None if run is None else run / FOLDER
        self._lock = threading.Lock()
        self._kept: dict[str, _Kept] = {}
        self._count = 0

    @property
    def place(self) -> str:
        return "" if self._folder is None else str(self._folder)

    def add(self, question: Question, answer: Answer) -> None:
        with self._lock:
            self._kept[str(self._count)] = _Kept(question, answer)
            self._count += 1
            while len(self._kept) > KEPT or sum(each.question.image.nbytes for each in self._kept.values()) > MAX_BYTES:
                del self._kept[next(iter(self._kept))]

    def list_questions(self) -> list[dict[str, Any]]:
        with self._lock:
            kept = list(self._kept.items())[::-1]
        return [
            {**_describe(name, each.question.text, each.question.choices, each.label), "said": _tell(each.answer)}
            for name, each in kept
        ]

    def encode_picture(self, name: str) -> bytes:
        return encode_file(self._find(name).question.image, "PNG", compress_level=1)

    def correct(self, name: str, answer: str) -> None:
        each = self._find(name)
        if self._folder is None:
            raise RequestError("recording is off, so a correction has no place: serve with --record DIR", 409)
        _check_choice(answer, each.question.choices)
        with self._lock:  # two pages may correct the same
            if each.picture is None or not (self._folder / each.picture).is_file():  # somebody may remove the run
                self._folder.mkdir(parents=True, exist_ok=True)
                picture = self._folder / f"{time.time_ns() // 1_000_000}-{name}.png"  # a restart counts names anew
                try:
                    picture.write_bytes(encode_file(each.question.image, "PNG", compress_level=1))
                except OSError:
                    picture.unlink(missing_ok=True)
                    raise
                each.picture = picture.name
            add_correction(self._folder, Correction(each.picture, each.question.text, each.question.choices, answer))
            each.label = answer

    def _find(self, name: str) -> _Kept:
        with self._lock:
            each = self._kept.get(name)
        if each is None:
            raise RequestError(f"question {name!r} is not among the newest any more", 404)
        return each


class LoggedAnswers:
    """Folders of AutoEval's --save_classifier_data, whose names say what was asked."""

    def __init__(self, folders: Sequence[Path]):
        """Raises DataError for a folder whose name names no task."""
        self._folders = [(folder, _find_task(folder)) for folder in folders]

    @property
    def place(self) -> str:
        return ", ".join(str(folder) for folder, _ in self._folders)

    def list_questions(self) -> list[dict[str, Any]]:
        found = []
        for number, (folder, task) in enumerate(self._folders):
            labels = _read_labels(folder)
            for logged in list_logged(folder):
                about = _describe(f"{number}.{logged.name}", task.question, task.choices, labels.get(logged.name))
                found.append({**about, "said": f"the call was satisfied: {logged.said}" if logged.said else ""})
        return found

    def encode_picture(self, name: str) -> bytes:
        folder, _, picture = self._find(name)
        return (folder / picture).read_bytes()

    def correct(self, name: str, answer: str) -> None:
        folder, task, picture = self._find(name)
        _check_choice(answer, task.choices)
        add_correction(folder, Correction(picture, task.question, task.choices, answer))

    def _find(self, name: str) -> tuple[Path, Task, str]:
        number, _, picture = name.partition(".")
        if number.isdecimal() and number.isascii() and int(number) < len(self._folders):
            folder, task = self._folders[int(number)]
            if any(logged.name == picture for logged in list_logged(folder)):
                return folder, task, picture
        raise RequestError(f"there is no picture {name!r}", 404)


def add_asked_routes(app: Flask, asked: Asked) -> None:
    """What the page's Detector part asks."""

    @app.get("/live/answers")
    def list_answers():
        return send_json({"place": asked.place, "questions": asked.list_questions()})

    @app.get("/live/answers/<name>")
    def show_picture(name: str):
        return Response(asked.encode_picture(name), mimetype="image/png")

    @app.post("/live/answers/<name>")
    def correct(name: str):
        if request.mimetype != "application/json":  # a foreign page can send no other kind unasked
            raise RequestError("send JSON, with Content-Type: application/json", 415)
        fields, _ = load_request(request.get_data(cache=False))
        answer = check_text(fields.get("answer"), "answer", MAX_CHOICE)
        try:
            asked.correct(name, answer)
        except OSError as error:
            reason = error.strerror or error
            raise RequestError(f"{asked.place} cannot be written ({reason}); then press it again", 507) from None
        return send_json({"id": name, "label": answer})


def _find_task(folder: Path) -> Task:
    task = find_asked(folder)
    if task is None:
        raise DataError(
            f"{folder} names none of AutoEval's tasks, so what its detector was asked is unknown; expected a name such "
            "as open_web_client_open_the_drawer_20260101"
        )
    return task


def _describe(name: str, question: str, choices: Sequence[str], label: str | None) -> dict[str, Any]:
    return {"id": name, "question": question, "choices": list(choices), "label": label}


def _tell(answer: Answer) -> str:
    return answer.choice if answer.probability is None else f"{answer.choice}, {100 * answer.probability:.0f} % sure"


def _read_labels(folder: Path) -> dict[str, str]:
    if not (folder / LABELS).exists():
        return {}
    return {name: each.answer for name, each in read_corrections(folder, lambda error: None).items()}


def _check_choice(answer: str, choices: Sequence[str]) -> None:
    if answer not in choices:
        raise RequestError(f"the right answer is one of {', '.join(choices)}, not {answer!r}")
