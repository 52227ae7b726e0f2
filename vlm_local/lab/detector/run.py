"""A detector asked about every labelled picture of a folder: rows, scores, report."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.answers import Answer
from vlm_local.data.questions import LabelledImage
from vlm_local.errors import ConfigError, DataError, EngineError, RequestError
from vlm_local.files import encode_json
from vlm_local.lab.detector.report import Shown, write_detection_report
from vlm_local.lab.detector.scores import score_answers
from vlm_local.provenance import describe_machine

MAX_SHOWN = 48
_MAX_FAULTS_IN_A_ROW = 3
_DECIMALS = 6

Ask = Callable[[np.ndarray], Answer]


def evaluate_detector(
    images: Iterable[LabelledImage],
    choices: tuple[str, ...],
    ask: Ask,
    folder: Path,
    precision: float,
    about: Mapping[str, Any],
    left_out: list[str],
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Rows go to `folder`/rows.jsonl as they come, scores to report.json and report.html.

    ask: a picture -> the detector's answer to the question. about: policy, data, question, for the
    report. left_out: filled by the reader of `images`. Raises EngineError after three failures in a
    row, ConfigError where `folder` holds another evaluation, DataError where there was no picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows_path = folder / "rows.jsonl"
    if rows_path.exists() and rows_path.stat().st_size:
        raise ConfigError(f"{folder} holds an evaluation already; choose another --out")
    rows: list[dict[str, Any]] = []
    shown: list[Shown] = []
    faults = 0
    with rows_path.open("w", encoding="utf-8") as file:
        for labelled in images:
            row = {"source": labelled.source, "label": labelled.answer, **_ask(ask, labelled.image)}
            file.write(encode_json(row) + "\n")
            file.flush()
            rows.append(row)
            faults = faults + 1 if row["answer"] is None else 0
            if faults == _MAX_FAULTS_IN_A_ROW:
                raise EngineError(f"the detector failed {faults} times in a row, last with: {row['fault']}")
            _keep_worst(shown, Shown(labelled.image, row))
            progress()
    if not rows:
        raise DataError("no picture could be read: " + "; ".join(left_out[:3]))
    report = {**about, **score_answers(rows, choices, precision), "wanted_precision": precision}
    report |= {"left_out": left_out, **describe_machine()}
    write_detection_report(folder, report, shown)
    return report


def _ask(ask: Ask, image: np.ndarray) -> dict[str, Any]:
    try:
        answer = ask(image)
    except (EngineError, RequestError) as error:
        return {"answer": None, "probabilities": None, "missing_mass": None, "fault": str(error)}
    told = answer.probabilities
    return {
        "answer": answer.choice,
        "probabilities": None if told is None else {name: round(p, _DECIMALS) for name, p in told.items()},
        "missing_mass": answer.missing_mass,
        "fault": None,
    }


def _keep_worst(shown: list[Shown], new: Shown) -> None:
    """The pictures worth a look: surely wrong first, then wrong, then right but unsure."""
    shown.append(new)
    shown.sort(key=Shown.rank)
    del shown[MAX_SHOWN:]
