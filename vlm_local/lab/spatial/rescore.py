"""The report of `spatial`, once more from its rows and its scenes, which are built again."""

import json
from pathlib import Path
from typing import Any

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines
from vlm_local.lab.spatial.faithfulness import REASONING, find_rights, score_cases
from vlm_local.lab.spatial.scores import score_study
from vlm_local.lab.spatial.sets import Gallery, SceneSet, require_frozen


def rescore(folder: Path, report: dict[str, Any], progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the report must be: fields that were scored again, and fields that only say how it was made.

    Instructions and right answers are the simulator's own again; pictures are not drawn.
    """
    made = json.loads((folder / "study.json").read_bytes())
    rows = list(read_json_lines(folder / "rows.jsonl"))
    told = {(row["scene"], row["change"]): row for row in rows}
    gallery = Gallery(SceneSet(**made["set"]), drawn=False)
    number = 0
    for number, (scene, view) in enumerate(gallery.show_all(), 1):
        row = told.pop((scene, view.change.name), {})
        signs = None if view.signs is None else list(view.signs)
        if (row.get("instruction"), row.get("signs")) != (view.observation.instruction, signs):
            raise DataError(
                f"rows.jsonl: scene {scene}, {view.change.name} asks {view.observation.instruction!r} and {signs} is "
                f"right, but the row says {row.get('instruction')!r} and {row.get('signs')}"
            )
        progress(number, len(rows))
    if told or len(rows) != number:
        raise DataError("rows.jsonl has rows of scenes that the set does not have, or a row twice")
    require_frozen(SceneSet(**made["set"]), gallery.frozen, DataError)
    if any(abs(sum(values) - 1) > 1e-4 or min(values) < 0 for row in rows for values in row["marginals"].values()):
        raise DataError("rows.jsonl has probabilities that do not add up to 1")
    scores = score_study(rows, made["set"]["seed"])
    if (folder / REASONING).exists():
        try:
            scores["reasoning"] = score_cases(list(read_json_lines(folder / REASONING)), find_rights(rows))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{REASONING}: {error}") from None
    return scores, made
