"""Parts of a checkup that are results of other commands: what its own report takes of theirs."""

from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

PARTS = ("spatial", "eval", "sim")  # names of their folders, and kinds of their results


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
