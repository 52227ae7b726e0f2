"""The report of `eval`, once more from its rows."""

import json
from pathlib import Path
from typing import Any

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines
from vlm_local.lab.offline.rows import hash_labels, load_rows
from vlm_local.lab.offline.scores import score_rows
from vlm_local.lab.offline.tally import GRIPPER_TOLERANCE_STEPS
from vlm_local.provenance import HOW_MADE

# What rows cannot show: how the answers were made, and what could not be read.
_STATED = ("data", "left_out", *HOW_MADE)


def rescore(folder: Path, report: dict[str, Any], progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the report must be: fields that were scored again, and fields that only say how it was made."""
    made = json.loads((folder / "evaluation.json").read_bytes())
    plan = made["plan"]
    rows = load_rows(folder)
    done = {line["episode"]: line for line in read_json_lines(folder / "episodes.jsonl")}
    unknown = set(rows.episode_ids.tolist()) - set(done)
    if unknown:
        raise DataError(f"rows.jsonl has episode {min(unknown)}, which episodes.jsonl does not have")
    steps = rows.step.tolist()
    places = set(zip(rows.episode.tolist(), steps, strict=True))
    if len(places) != len(rows) or any(step % plan["every"] for step in steps):
        raise DataError(f"rows.jsonl has a step twice, or one that is not every {plan['every']}th")
    stated = {name: report[name] for name in _STATED if name in report}
    stated |= {"policy": {"name": plan["policy"], **made.get("policy", {})}, "answer_ms": made.get("answer_ms")}
    scored = score_rows(rows, plan["seed"]) | {
        "seed": plan["seed"],
        "labels_sha256": hash_labels(rows),
        "gripper_tolerance_steps": GRIPPER_TOLERANCE_STEPS,
    }
    return scored, stated
