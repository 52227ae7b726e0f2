"""A detector asked about every labelled picture of a folder: rows, scores, report."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.answers import Answer
from vlm_local.data.questions import LabelledImage
from vlm_local.errors import DataError, EngineError, RequestError
from vlm_local.lab.asked import Row, Shown, describe_answer, keep_worst, refuse_faults
from vlm_local.lab.detector.report import write_report
from vlm_local.lab.detector.scores import score_answers
from vlm_local.lab.results import ResultFolder, RowFile
from vlm_local.provenance import choose_deciding, describe_machine

Ask = Callable[[np.ndarray], Answer]


def evaluate_detector(
    images: Iterable[LabelledImage],
    choices: tuple[str, ...],
    ask: Ask,
    path: Path,
    precision: float,
    about: Mapping[str, Any],
    left_out: list[str],
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Rows go to rows.jsonl in the folder `path` as they come, scores to report.json and report.html.

    ask: a picture -> the detector's answer to the question. precision: wanted of the answers that count. about:
    policy, data and question. left_out: filled by the reader of `images`. Raises EngineError after three failures
    in a row, ConfigError where the folder holds another result, DataError where there was no picture.
    """
    with ResultFolder(path, "eval-answers", "detector.json") as folder:
        with closing(RowFile(path / "rows.jsonl", keep=lambda row: row["answer"] is not None)) as file:
            folder.begin({**about, "choices": choices, **describe_machine()}, _list_settings, bool(file.rows))
            rows, worst = _ask_all(images, ask, file, progress)
        if not rows:
            raise DataError("no picture could be read: " + ("; ".join(left_out[:3]) or "there is none"))
        report = {**folder.settings, **score_answers(rows, choices, precision), "wanted_precision": precision}
        report["left_out"] = left_out
        write_report(path, report, worst)
        return report


def _list_settings(made: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts; pictures may be added."""
    policy = {"policy": made["policy"]["name"], **choose_deciding(made["policy"])}
    return {**policy, **{name: made[name] for name in ("data", "question", "choices")}}


def _ask_all(
    images: Iterable[LabelledImage], ask: Ask, file: RowFile, progress: Callable[[], object]
) -> tuple[list[Row], list[Shown]]:
    """Rows of all pictures, and the pictures worth a look.

    A picture that was answered before is not asked again. It is known by its pixels: another folder has the same names.
    """
    known = {(row["source"], row["label"], row.get("sha256")): row for row in file.rows}
    rows: list[Row] = []
    worst: list[Shown] = []
    for labelled in images:
        sha256 = _hash(labelled.image)
        row = known.get((labelled.source, labelled.answer, sha256))
        if row is None:
            picture = {"source": labelled.source, "label": labelled.answer, "sha256": sha256}
            row = {**picture, **_ask(ask, labelled.image)}
            file.add(row)
        rows.append(row)
        refuse_faults(rows, "the detector")
        keep_worst(worst, (labelled.image, row))
        progress()
    return rows, worst


def _hash(image: np.ndarray) -> str:
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()


def _ask(ask: Ask, image: np.ndarray) -> dict[str, Any]:
    try:
        answer = ask(image)
    except (EngineError, RequestError) as error:
        return {"answer": None, "probabilities": None, "missing_mass": None, "fault": str(error)}
    return {**describe_answer(answer), "missing_mass": answer.missing_mass, "fault": None}
