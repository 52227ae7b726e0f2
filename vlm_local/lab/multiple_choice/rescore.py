"""The report of `eval-choices`, once more from its rows."""

from pathlib import Path
from typing import Any

from vlm_local.errors import DataError
from vlm_local.files import read_json_object
from vlm_local.lab.asked import Row
from vlm_local.lab.multiple_choice.scores import score_rows
from vlm_local.lab.multiple_choice.trials import load_rows

_ROUNDED = 1e-4  # how far the sum of probabilities may be above 1


def rescore(folder: Path, report: dict[str, Any], progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the report must be: fields that were scored again, and fields that only say how it was made."""
    rows = load_rows(folder, report)
    asked: set[str] = set()
    for row in rows:
        if row["index"] in asked:
            raise DataError(f"rows.jsonl has the question of index {row['index']} twice")
        asked.add(row["index"])
        _check_row(row)
    made = read_json_object(folder / "questions.json")
    return score_rows(rows), {**made, "left_out": report["left_out"]}


def _check_row(row: Row) -> None:
    """Raises DataError for answers that nobody could have given to this question."""
    said = [row["label"]] if row["fault"] is not None else [row["label"], row["answer"], row["blind"]]
    if not set(said) <= set(row["choices"]) or (row["fault"] is not None and row["answer"] is not None):
        raise DataError(f"rows.jsonl: the answers to index {row['index']} are none of its choices")
    told = row["probabilities"]
    if told is None:
        return
    # Said so that NaN, which any comparison with is false, is refused.
    if list(told) != row["choices"] or not (min(told.values()) >= 0 and sum(told.values()) <= 1 + _ROUNDED):
        raise DataError(f"rows.jsonl: the probabilities of index {row['index']} are none of its choices")
