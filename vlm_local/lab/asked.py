"""What the studies share that ask questions about pictures: their rows, when they give up, what their pages show.

A row has label, the right answer; answer, None where there was none; fault, why there was none, else None; and
probabilities, {choice: p}, None where they are not known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.answers import Answer
from vlm_local.errors import EngineError

_MAX_FAULTS_IN_A_ROW = 3
_MAX_SHOWN = 48
_DECIMALS = 6

Row = Mapping[str, Any]
Shown = tuple[np.ndarray, Row]  # a picture, uint8 (H, W, 3), and its row


def describe_answer(answer: Answer) -> dict[str, Any]:
    """Fields of a row."""
    told = answer.probabilities
    rounded = None if told is None else {choice: round(p, _DECIMALS) for choice, p in told.items()}
    return {"answer": answer.choice, "probabilities": rounded}


def refuse_faults(rows: Sequence[Row], who: str) -> None:
    """Raises EngineError where the last three rows have no answer. rows: in the order in which they were asked."""
    faults = [row["fault"] for row in rows[-_MAX_FAULTS_IN_A_ROW:] if row["fault"] is not None]
    if len(faults) == _MAX_FAULTS_IN_A_ROW:
        raise EngineError(
            f"{who} failed {len(faults)} times in a row, last with: {faults[-1]}; mend it, and the same command goes on"
        )


def keep_worst(shown: list[Shown], new: Shown) -> None:
    """Add `new` to the pictures that a page shows, and keep _MAX_SHOWN: first surely wrong answers, then other wrong
    ones, then right ones of which the model was least sure.
    """
    shown.append(new)
    shown.sort(key=lambda each: _rank(each[1]))
    del shown[_MAX_SHOWN:]


def _rank(row: Row) -> float:
    """Smaller is shown first: minus the answer's probability where it is wrong, 1 plus it where it is right."""
    told = row["probabilities"]
    sureness = told[row["answer"]] if told and row["answer"] is not None else 0.0
    return 1 + sureness if row["answer"] == row["label"] else -sureness
