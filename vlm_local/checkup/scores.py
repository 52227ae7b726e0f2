"""Results of the stages that are made of many -> their numbers: rows of pictures, and reports of other commands.

A row is of a picture that two decoders answered: picture, task, phrase (of the tree decoder), outlines (its phrase),
near_tie (whether the tree decoder saw that it could not tell the best two apart), oracle (the right phrase), ms and
outlines_ms of each decoding.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Report = Mapping[str, Any]

PARTS = ("spatial", "eval", "sim")  # names of their folders, and kinds of their results


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


def summarise_part(kind: str, report: Report) -> dict[str, Any]:
    """report: report.json of a part."""
    if kind == "spatial":
        return {"scenes": report["scenes"], **{name: report[name] for name in ("turned", "moved", "left", "right")}}
    if kind == "eval":
        exact = {"exact": report["exact"], "repeat_last": report["baselines"]["repeat_last"]["exact"]}
        return {"steps": report["steps"], "episodes": report["episodes"], **exact}
    tasks = report["tasks"].values()
    counts = {
        name: sum(score[key]["count"] for score in tasks)
        for name, key in (("won", "success"), ("oracle", "oracle"), ("random", "random"))
    }
    played = sum(score["episodes"] - score["faulted"] for score in tasks)
    return {**counts, "played": played, "faulted": report["faulted"], "tasks": len(report["tasks"])}
