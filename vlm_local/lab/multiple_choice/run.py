"""A model asked the questions of a benchmark, with their pictures and with grey ones in their place."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.answers import Answer
from vlm_local.data.multiple_choice import ChoiceQuestion
from vlm_local.errors import DataError, EngineError, RequestError
from vlm_local.lab.asked import Row, Shown, describe_answer, keep_worst, refuse_faults
from vlm_local.lab.multiple_choice.report import write_report
from vlm_local.lab.multiple_choice.scores import score_rows
from vlm_local.lab.results import ResultFolder, RowFile
from vlm_local.plain import escape_controls
from vlm_local.provenance import choose_deciding, describe_machine
from vlm_local.types import Picture, Prompt

_GREY = 127  # of 255, as the blank pictures of --contrast

Ask = Callable[[np.ndarray, Prompt, tuple[str, ...]], Answer]


def evaluate_questions(
    questions: Iterable[ChoiceQuestion],
    ask: Ask,
    path: Path,
    about: Mapping[str, Any],
    left_out: list[str],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Rows go to rows.jsonl in the folder `path` as they come, scores to report.json and report.html.

    ask: `Answerer.choose`. about: policy, data (the file's name) and its sha256. left_out: filled by the reader of
    `questions` and with what the model cannot be asked. Raises EngineError after three failures in a row, ConfigError
    where the folder holds another result, DataError where no question could be asked.
    """
    with ResultFolder(path, "eval-choices", "questions.json") as folder:
        with closing(RowFile(path / "rows.jsonl", keep=lambda row: row["fault"] is None)) as file:
            folder.begin({**about, **describe_machine()}, _list_settings, bool(file.rows), grows=("data_sha256",))
            rows, shown = _ask_all(questions, ask, file, left_out, progress)
        if not rows:
            raise DataError("no question could be asked: " + ("; ".join(left_out[:3]) or "there is none"))
        report = {**folder.settings, **score_rows(rows), "left_out": left_out}
        write_report(path, report, shown)
        return report


def _ask_all(
    questions: Iterable[ChoiceQuestion], ask: Ask, file: RowFile, left_out: list[str], progress: Callable[[], object]
) -> tuple[list[Row], list[Shown]]:
    """Rows of all questions, and those worth a look. What was answered before is not asked again."""
    known = {_identify(row): row for row in file.rows}
    rows: list[Row] = []
    shown: list[Shown] = []
    for question in questions:
        described = _describe(question)
        row = known.get(_identify(described))
        if row is None:
            try:
                row = {**described, **_ask_both(ask, question)}
            except RequestError as error:  # e.g. several pictures, of a family that reads one
                left_out.append(f"index {question.index}: {error}")
                continue
            file.add(row)
        rows.append(row)
        refuse_faults(rows, "the model")
        keep_worst(shown, (question.pictures[-1], row))
        progress()
    return rows, shown


def _list_settings(made: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts; questions may be added."""
    return {"policy": made["policy"]["name"], **choose_deciding(made["policy"]), "data": made["data"]}


def _identify(row: Row) -> tuple:
    return tuple(row[name] for name in ("index", "question", "label", "sha256"))


def _describe(question: ChoiceQuestion) -> Row:
    category = escape_controls(question.category)  # the name of a row in tables
    about = {"index": question.index, "category": category, "question": question.text}
    return about | {"choices": list(question.answers), "label": question.label, "sha256": question.sha256}


def _ask_both(ask: Ask, question: ChoiceQuestion) -> Row:
    """answer: to the pictures; blind: to grey ones. Both None where either failed, with the fault. Raises RequestError
    for what the model cannot be asked.
    """
    try:
        seeing = _ask(ask, question, question.pictures)
        blind = _ask(ask, question, [np.full_like(picture, _GREY) for picture in question.pictures])
    except EngineError as error:
        return {"answer": None, "probabilities": None, "blind": None, "fault": str(error)}
    return {**describe_answer(seeing), "blind": blind.choice, "fault": None}


def _ask(ask: Ask, question: ChoiceQuestion, pictures: Iterable[np.ndarray]) -> Answer:
    *earlier, last = pictures
    return ask(last, Prompt("", question.text, tuple(map(Picture, earlier))), question.answers)
