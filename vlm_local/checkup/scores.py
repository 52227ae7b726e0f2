"""Rows of pictures that two decoders answered -> whether they agree, how fast each was, and how one-sided the answers.

A row: picture, task, phrase (of the tree decoder), outlines (its phrase), near_tie (whether the tree decoder saw that
it could not tell the best two apart), oracle (the right phrase), ms and outlines_ms of each decoding.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]


def count_disagreements(mine: Sequence[str], theirs: Sequence[str], near_ties: Sequence[bool]) -> dict[str, int]:
    """Answers that differ, and those that may not: where the best two were a near tie, rounding decides."""
    differs = [one != other for one, other in zip(mine, theirs, strict=True)]
    return {
        "disagreements": sum(differs),
        "near ties": sum(near_ties),
        "disagreements but near ties": sum(a and not b for a, b in zip(differs, near_ties, strict=True)),
    }


def score_pictures(rows: Sequence[Row]) -> dict[str, Any]:
    """rows: at least one."""
    mine, theirs = [row["phrase"] for row in rows], [row["outlines"] for row in rows]
    return {
        "pictures": len(rows),
        **count_disagreements(mine, theirs, [row["near_tie"] for row in rows]),
        "most_said": _find_most(mine),
        "most_right": _find_most(row["oracle"] for row in rows),
        "right": sum(row["phrase"] == row["oracle"] for row in rows) / len(rows),
        "ms": float(np.median([row["ms"] for row in rows])),
        "outlines_ms": float(np.median([row["outlines_ms"] for row in rows])),
    }


def _find_most(phrases: Iterable[str]) -> dict[str, Any]:
    """The phrase said most often, the first of them where several are, and its share."""
    counts = Counter(phrases)
    phrase, count = counts.most_common(1)[0]
    return {"phrase": phrase, "share": count / counts.total()}
