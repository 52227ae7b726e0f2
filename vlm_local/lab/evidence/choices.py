"""Which settings of a policy a row of a table must name: with another one, the same weights are another policy."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_local.actions import build_step_table
from vlm_local.embodiments import AUTO
from vlm_local.policy_options import DEFAULTS

_PLAIN = ("quantize", "decide", "temperature", "history", "contrast", "marks", "steps_per_phrase", "embodiment")
_OWN_PROMPTS = ("chat", "prompt")  # what is taken without --prompt: the shipped one, or a checkpoint's prompt.txt
_PARTS = {"examples": "num", "frames": "num", "think": "name"}  # what is said of each, by the key in its metadata


def list_choices(policy: Mapping[str, Any], own: Mapping[str, Any] | None = None) -> list[str]:
    """Settings of a model that are not the usual ones, as their flags say them: ["contrast 0.5", "history 2"].

    policy: its metadata, of which nothing is told where no model was loaded. own: the checkpoint's sidecar, whose
    settings are usual with these weights.
    """
    if policy.get("engine") in (None, "scripted"):
        return []
    return list(_list_choices(policy, DEFAULTS | dict(own or {})))


def list_runs_choices(plan: Mapping[str, Any]) -> list[str]:
    """What a run in the simulator did to its policy. plan: as meta.json has it."""
    noise = [f"{plan['noise']:.0%} random"] if plan["noise"] else []
    return noise + ([] if plan["control"] == "none" else [plan["control"]])


def _list_choices(policy: Mapping[str, Any], usual: Mapping[str, Any]) -> Iterator[str]:
    for name in _PLAIN:
        if name in policy and policy[name] != usual.get(name):
            yield f"{name.replace('_', '-')} {policy[name]}"
    for name, shown in (("grammar", (usual["grammar"],)), ("prompt", (*_OWN_PROMPTS, _name_prompt(usual)))):
        if name in policy and policy[name]["name"] not in shown:
            yield f"{name} {policy[name]['name']}"
    for name, key in _PARTS.items():
        if name in policy:
            yield f"{name} {policy[name][key]}"
    table = asdict(build_step_table({}))
    # Another robot has steps of its own.
    if policy.get("embodiment", AUTO) == AUTO and {**table, **policy.get("steps", {}), "slightly": None} != table:
        yield "own steps"


def _name_prompt(usual: Mapping[str, Any]) -> str | None:
    return Path(usual["prompt"]).stem if usual.get("prompt") else None
