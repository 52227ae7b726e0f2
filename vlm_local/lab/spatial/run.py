"""A policy before every scene of a set and every change of it: rows, scores, report, in one folder."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import ConfigError, EngineError
from vlm_local.files import write_json
from vlm_local.lab.results import ResultFolder, RowFile
from vlm_local.lab.spatial.faithfulness import REASONING, ask_cases, check_alone, find_rights, score_cases
from vlm_local.lab.spatial.report import write_report
from vlm_local.lab.spatial.scenes import CHANGES
from vlm_local.lab.spatial.scores import score_study
from vlm_local.lab.spatial.sets import Gallery, SceneSet, View, require_frozen
from vlm_local.policy import Policy, derive_seed
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.provenance import choose_deciding, describe_machine
from vlm_local.types import AXES, Decision

Answer = Callable[[View, int], Decision]


def run_study(
    name: str,
    policy: Policy,
    scene_set: SceneSet,
    path: Path,
    progress: Callable[[int], object] = lambda views: None,
    reasons: bool = False,
) -> dict[str, Any]:
    """Ask, score and report into the folder `path`; returns the report.

    name: of the policy, as the user named it. progress: is given 1 for every view and case. reasons: the policy thinks
    in its steps, so that it is also asked behind reasoning about other scenes. Raises ConfigError where the folder
    holds another result or a frozen set comes out otherwise, EngineError where the policy fails.
    """
    if reasons:
        check_alone(policy.metadata)
    here = {"set": vars(scene_set), "frozen": scene_set.scenes_sha256 is not None}
    here |= {"policy": {"name": name, **policy.metadata}, **describe_machine()}
    with ResultFolder(path, "spatial", "study.json") as folder, closing(Gallery(scene_set)) as gallery:
        with closing(RowFile(path / "rows.jsonl")) as file:
            num_there = math.ceil(len(file.rows) / (1 + len(CHANGES)))
            if num_there > scene_set.scenes:
                raise ConfigError(
                    f"{path} holds rows of {num_there} scenes, and all are scored; ask about as many scenes again, or"
                    " choose another --out"
                )
            folder.begin(here, _list_settings, bool(file.rows), grows=("set",))
            rows = ask(gallery, lambda view, scene: _act(policy, view, scene), progress, file.rows, file.add)
        require_frozen(scene_set, gallery.frozen)
        folder.update(set=vars(gallery.frozen))
        write_json(path / "set.json", vars(gallery.frozen))
        report = {**folder.settings, **score_study(rows, scene_set.seed)}
        if reasons:
            rights = find_rights(rows)
            with closing(RowFile(path / REASONING)) as file:
                cases = ask_cases(gallery, policy, rights, progress, file.rows, file.add)
            report["reasoning"] = score_cases(cases, rights)
        write_report(path, report, rows, gallery)
    return report


def _list_settings(made: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts. Scenes may be added, and hashes of the set are known at its end."""
    scenes = {name: made["set"][name] for name in ("level", "seed")}
    return {**scenes, "frozen": made["frozen"], "name": made["policy"]["name"], **choose_deciding(made["policy"])}


def ask(
    gallery: Gallery,
    answer: Answer,
    progress: Callable[[int], object] = lambda views: None,
    known: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row for each view: scene, change, instruction, signs (or None), phrase, marginals.

    known: rows of the first views, or of all, which are not asked again. keep: is given every other row at once.
    Raises ConfigError where a known row is of another view.
    """
    rows, left = [], iter(known)
    for index, view in gallery.show_all():
        old = next(left, None)
        shown = describe_view(index, view)
        if old is None:
            decision = answer(view, index)
            rows.append(shown | {"phrase": decision.phrase, "marginals": read_marginals(decision)})
            keep(rows[-1])
        elif shown.items() <= old.items():
            rows.append(dict(old))
        else:
            raise ConfigError(f"the rows were made with other scenes: {shown} is shown now; choose another --out")
        progress(1)
    return rows


def describe_view(scene: int, view: View) -> dict[str, Any]:
    """What a row says of the view itself."""
    return {
        "scene": scene,
        "change": view.change.name,
        "instruction": view.observation.instruction,
        "signs": None if view.signs is None else list(view.signs),
        "right": None if view.signs is None else format_phrase(view.signs),
    }


def _act(policy: Policy, view: View, scene: int) -> Decision:
    """Every view is an episode of its own; views of a scene have the same draws."""
    policy.reset(derive_seed(0, "spatial", scene))
    decision = policy.act(view.observation)
    if decision.fault:
        raise EngineError(f"the policy failed on scene {scene}, {view.change.name}: {decision.fault}")
    if decision.phrase is None:
        raise ConfigError("the policy says no phrases, only numbers; `spatial` needs a policy that says phrases")
    return decision


def read_marginals(decision: Decision) -> Mapping[str, list[float]]:
    """Axis -> p(-), p(0), p(+), adding up to 1; all on the phrase where the policy tells no probabilities."""
    if decision.marginals is None:
        signs = parse_phrase(decision.phrase or "")
        return {axis: [float(sign == other) for other in (-1, 0, 1)] for axis, sign in zip(AXES, signs, strict=True)}
    marginals = {axis: np.array(decision.marginals[axis]) for axis in AXES}
    return {axis: (values / values.sum()).round(6).tolist() for axis, values in marginals.items()}
