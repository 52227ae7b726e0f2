"""The report of `spatial`, once more from its rows and its scenes, which are built again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_local.errors import DataError
from vlm_local.files import read_json_lines, read_json_object
from vlm_local.lab.spatial.faithfulness import REASONING, find_rights, score_cases
from vlm_local.lab.spatial.run import describe_view
from vlm_local.lab.spatial.scores import score_study
from vlm_local.lab.spatial.sets import Gallery, SceneSet, require_frozen


def rescore(folder: Path, report: dict[str, Any], progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the report must be: fields that were scored again, and fields that only say how it was made.

    Instructions and right answers are the simulator's own again; pictures are not drawn.
    """
    made = read_json_object(folder / "study.json")
    rows = list(read_json_lines(folder / "rows.jsonl"))
    _check_scenes(rows, SceneSet(**made["set"]), progress)
    told_values = [values for row in rows for values in row["marginals"].values()]
    # Said so that NaN, which any comparison with is false, is refused: a scene without numbers would be in no score.
    if not all(len(of) == 3 and min(of) >= 0 and abs(sum(of) - 1) <= 1e-4 for of in told_values):
        raise DataError("rows.jsonl has probabilities that are no three numbers from 0 on that add up to 1")
    scores = score_study(rows, made["set"]["seed"])
    if (folder / REASONING).exists():
        try:
            scores["reasoning"] = score_cases(list(read_json_lines(folder / REASONING)), find_rights(rows))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{REASONING}: {error}") from None
    return scores, made


def _check_scenes(rows: Sequence[Mapping[str, Any]], scene_set: SceneSet, progress) -> None:
    """Raises DataError where the rows are not those of every scene and change of the set, each once."""
    told = {(row["scene"], row["change"]): row for row in rows}
    gallery, number = Gallery(scene_set, drawn=False), 0
    for number, (scene, view) in enumerate(gallery.show_all(), 1):
        row = told.pop((scene, view.change.name), {})
        shown = describe_view(scene, view)
        here = {name: row.get(name) for name in shown}
        if here != shown:
            raise DataError(f"rows.jsonl: the scene is {shown}, but the row says {here}")
        progress(number, len(rows))
    if told or len(rows) != number:
        raise DataError("rows.jsonl has rows of scenes that the set does not have, or a row twice")
    require_frozen(scene_set, gallery.frozen, DataError)
