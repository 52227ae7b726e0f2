"""A policy before every scene of a set and every change of it: rows, scores, report, in one folder."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from vlm_local.errors import ConfigError, EngineError
from vlm_local.files import encode_json, open_replacing, read_json_lines, write_json
from vlm_local.lab.spatial.report import write_report
from vlm_local.lab.spatial.scores import score_study
from vlm_local.lab.spatial.sets import Gallery, SceneSet, View, require_frozen
from vlm_local.policy import Policy, derive_seed
from vlm_local.primitives import format_phrase, parse_phrase
from vlm_local.provenance import choose_deciding, describe_machine, join_parts, list_differences
from vlm_local.types import AXES, Decision

_STUDY, _ROWS = "study.json", "rows.jsonl"

Answer = Callable[[View, int], Decision]


def run_study(
    name: str,
    policy: Policy,
    scene_set: SceneSet,
    folder: Path,
    progress: Callable[[int], None] = lambda views: None,
) -> dict[str, Any]:
    """Ask, score and report into `folder`; returns the report. A study that was stopped goes on.

    Raises ConfigError where the folder holds anything else or a frozen set comes out otherwise, EngineError
    where the policy fails.
    """
    made: dict[str, Any] = {"set": vars(scene_set), "frozen": scene_set.scenes_sha256 is not None}
    made |= {"policy": {"name": name, **policy.metadata}, **describe_machine()}
    made, rows = _open_folder(folder, json.loads(encode_json(made)))
    gallery = Gallery(scene_set)
    try:
        with (folder / _ROWS).open("a", encoding="utf-8") as file:
            rows = ask(gallery, lambda view, scene: _act(policy, view, scene), progress, rows, partial(_write, file))
        require_frozen(scene_set, gallery.frozen)
        made["set"] = vars(gallery.frozen)
        write_json(folder / _STUDY, made)
        write_json(folder / "set.json", made["set"])
        report = {**made, **score_study(rows, scene_set.seed)}
        write_report(folder, report, rows, gallery)
    finally:
        gallery.close()
    return report


def _open_folder(folder: Path, made: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """study.json of the whole study, and the rows of one that was stopped; the line that a kill cut off is left out."""
    path = folder / _STUDY
    if (folder / "report.json").exists() or (folder.exists() and not path.exists() and any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something already; choose another --out")
    rows = []
    if path.exists():
        try:
            there = json.loads(path.read_bytes())
            differences = list(list_differences(_list_settings(there), _list_settings(made)))
            rows = list(read_json_lines(folder / _ROWS)) if (folder / _ROWS).exists() else []
            made = join_parts(there, made)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{folder} holds no study that can go on ({error!r}); choose another --out") from None
        if differences:
            raise ConfigError(f"{folder} holds another study: {'; '.join(differences)}; choose another --out")
    write_json(path, made)
    with open_replacing(folder / _ROWS) as file:
        for row in rows:
            _write(file, row)
    return dict(made), rows


def _list_settings(made: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same in all parts of a study. The set's hashes are only known at its end."""
    scenes = {name: made["set"][name] for name in ("level", "seed", "scenes")}
    return {**scenes, "frozen": made["frozen"], "name": made["policy"]["name"], **choose_deciding(made["policy"])}


def _write(file: TextIO, row: Mapping[str, Any]) -> None:
    file.write(encode_json(row) + "\n")
    file.flush()


def ask(
    gallery: Gallery,
    answer: Answer,
    progress: Callable[[int], None] = lambda views: None,
    known: Sequence[Mapping[str, Any]] = (),
    keep: Callable[[Mapping[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row for each view: scene, change, instruction, signs (or None), phrase, marginals.

    known: rows of the first views, which are not asked again. keep: is given every other row at once.
    Raises ConfigError where a known row is of another view.
    """
    rows, left = [], iter(known)
    for index, view in gallery.show_all():
        old = next(left, None)
        shown = {"scene": index, "change": view.change.name, "instruction": view.observation.instruction}
        if old is None:
            rows.append(shown | _describe(view, answer(view, index)))
            keep(rows[-1])
        elif shown.items() <= old.items():
            rows.append(dict(old))
        else:
            raise ConfigError(f"the rows were made with other scenes: {shown} is shown now; choose another --out")
        progress(1)
    if next(left, None) is not None:
        raise ConfigError(
            "there are more rows than views, so they were changed by something else; choose another --out"
        )
    return rows


def _describe(view: View, decision: Decision) -> dict[str, Any]:
    return {
        "signs": None if view.signs is None else list(view.signs),
        "right": None if view.signs is None else format_phrase(view.signs),
        "phrase": decision.phrase,
        "marginals": read_marginals(decision),
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
        signs = parse_phrase(decision.phrase)
        return {axis: [float(sign == other) for other in (-1, 0, 1)] for axis, sign in zip(AXES, signs, strict=True)}
    marginals = {axis: np.array(decision.marginals[axis]) for axis in AXES}
    return {axis: (values / values.sum()).round(6).tolist() for axis, values in marginals.items()}
