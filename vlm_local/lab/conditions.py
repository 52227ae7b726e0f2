"""Under which conditions results that are compared were made, and in which they differ.

Whoever reads a difference must know what it may come from: another prompt, camera or step table, another version.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm_local.provenance import choose_deciding

Result = Mapping[str, Any]  # of the "results" of `comparison.compare`

_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,}")  # of a file or commit, which its first digits tell from others


def describe_trials(result: Mapping[str, Any]) -> str:
    """How many trials are compared, and of how many."""
    noun = result["noun"]
    numbers = f"{result['trials']} shared {noun}s"
    most = max(told["trials"] for told in result["results"])
    if most > result["trials"]:
        numbers += f" of up to {most}"
    if result["units"] < result["trials"]:
        numbers += f" in {result['units']} {result['unit_noun']}s"
    settings = [f"{name.replace('_', ' ')} {value}" for name, value in result["settings"].items()]
    told = ", ".join(filter(None, [*settings, _tell_shared(result["results"])]))
    return numbers + (f"; {told}" if told else "")


def describe_conditions(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know before the numbers: episodes that faulted, and what differs between the results."""
    lines = [
        f"Left out as faulted: {told['left_out']} of {told['left_out'] + told['trials']} "
        f"{result['noun']}s of {told['name']}."
        for told in result["results"]
        if told["left_out"]
    ]
    return lines + [f"Differs: {line}." for line in _list_differing(result["results"])]


def _tell_shared(results: Sequence[Result]) -> str:
    """What all were asked under, e.g. "data bridge/1.0.0, camera image_0"."""
    first, *others = (result["conditions"] for result in results)
    shared = {name: told for name, told in first.items() if all(other.get(name) == told for other in others)}
    return ", ".join(f"{name} {_show(told)}" for name, told in shared.items() if told is not None)


def _list_differing(results: Sequence[Result]) -> list[str]:
    """Settings, data and versions that differ, e.g. "contrast: 0.0 in A, C; 0.5 in B".

    What fewer than two results tell is no difference: a baseline has no prompt.
    """
    told = {result["name"]: dict(_flatten(_list_conditions(result))) for result in results}
    lines = []
    for setting in dict.fromkeys(name for settings in told.values() for name in settings):
        names: dict[str, list[str]] = {}
        for name, settings in told.items():
            if setting in settings:
                names.setdefault(_show(settings[setting]), []).append(name)
        if len(names) > 1:
            lines.append(f"{setting}: " + "; ".join(f"{value} in {', '.join(of)}" for value, of in names.items()))
    return lines


def _list_conditions(result: Result) -> dict[str, Any]:
    made_with = result["made_with"]
    policy = choose_deciding(made_with["policy"])
    if policy.get("engine") in (None, "scripted"):  # baselines and servers of others: what they tell decides nothing
        policy = {name: policy[name] for name in ("steps",) if name in policy}
    made = {f"version of {name}": version for name, version in made_with.get("versions", {}).items()}
    made |= {"commit": made_with["git"]} if made_with.get("git") else {}
    return {**policy, **result["conditions"], **made}


def _flatten(settings: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """One in another as "prompt name"."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{before}{name} ")
        else:
            yield f"{before}{name}".replace("_", " "), value


def _show(value: Any) -> str:
    if value is None:
        return "none"
    return _DIGEST.sub(r"\1", value if isinstance(value, str) else json.dumps(value))
