"""A policy before every scene of a set and every change of it: rows, scores, report, in one folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import ConfigError, EngineError
from vlm_local.files import encode_json, open_replacing, write_json
from vlm_local.policy import Policy, derive_seed
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.provenance import describe_machine
from vlm_local.spatial.report import write_report
from vlm_local.spatial.scores import score_study
from vlm_local.spatial.sets import Gallery, SceneSet, require_frozen
from vlm_local.spatial.stage import View
from vlm_local.types import AXES, Decision

Answer = Callable[[View, int], Decision]


def run_study(
    name: str,
    policy: Policy,
    scene_set: SceneSet,
    folder: Path,
    progress: Callable[[int], None] = lambda views: None,
) -> dict[str, Any]:
    """Ask, score and report into `folder`; returns the report.

    Raises ConfigError where the folder is not empty or a frozen set comes out otherwise, EngineError
    where the policy fails.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something already; choose another --out")
    gallery = Gallery(scene_set)
    try:
        rows = ask(gallery, lambda view, scene: _act(policy, view, scene), progress)
        require_frozen(scene_set, gallery.frozen)
        with open_replacing(folder / "rows.jsonl") as file:
            file.writelines(encode_json(row) + "\n" for row in rows)
        made: dict[str, Any] = {"set": vars(gallery.frozen), "frozen": scene_set.scenes_sha256 is not None}
        made |= {"policy": {"name": name, **policy.metadata}, **describe_machine()}
        write_json(folder / "study.json", made)
        write_json(folder / "set.json", vars(gallery.frozen))
        report = {**made, **score_study(rows, scene_set.seed)}
        write_report(folder, report, rows, gallery)
    finally:
        gallery.close()
    return report


def ask(gallery: Gallery, answer: Answer, progress=lambda views: None) -> list[dict[str, Any]]:
    """A row for each view: scene, change, instruction, signs (or None), phrase, marginals."""
    rows = []
    for index, view in gallery.show_all():
        decision = answer(view, index)
        rows.append(
            {
                "scene": index,
                "change": view.change.name,
                "instruction": view.observation.instruction,
                "signs": None if view.signs is None else list(view.signs),
                "right": None if view.signs is None else format_phrase(view.signs),
                "phrase": decision.phrase,
                "marginals": read_marginals(decision),
            }
        )
        progress(1)
    return rows


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
        signs = parse_phrase(decision.phrase)
        return {axis: [float(sign == other) for other in (-1, 0, 1)] for axis, sign in zip(AXES, signs, strict=True)}
    marginals = {axis: np.array(decision.marginals[axis]) for axis in AXES}
    return {axis: (values / values.sum()).round(6).tolist() for axis, values in marginals.items()}
