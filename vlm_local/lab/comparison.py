"""Results of one kind on the trials that all of them have: scores, differences of every pair, intervals, p-values.

A study gives its results as Trials; nothing here knows what a trial is. Differences are taken trial by trial, so that
hard scenes weigh on both sides alike.
"""

import itertools
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.files import read_json_object
from vlm_local.lab.conditions import describe_conditions, describe_trials
from vlm_local.lab.formats import (
    Interval,
    format_fixed,
    format_p,
    format_points,
    format_range,
    format_share,
    format_span,
)
from vlm_local.lab.statistics import (
    adjust_holm,
    bootstrap_ratio,
    find_paired_interval,
    permutation_test,
    wilson,
)
from vlm_local.provenance import tell_making

OVERALL = ""  # the group of measures of the whole result; others are of its axes or tasks
LETTERS = string.ascii_uppercase  # by which results are named, so there may be this many
_SEED = 0  # of bootstraps and permutation tests
_DECIMALS = 3  # of scores that are no shares: with two, a difference that is no chance reads as 0


@dataclass(frozen=True)
class Measure:
    """group: OVERALL, or what `name` is one of, e.g. "axis". is_share: of successes, written in percent."""

    name: str
    group: str = OVERALL
    is_share: bool = True
    lower_is_better: bool = False


@dataclass(frozen=True, eq=False)
class Trials:
    """What one result says of each of its N trials.

    kind: the command that made it. noun, truth_noun, unit_noun: what a trial, its truth and its unit are called.
    settings: what must be the same in results that are compared. conditions: what should be, and is told where it is
    not; None for what there is none of. about: what the result was made with. left_out: trials that faulted, which are
    not among the N. keys: the trials' names, by which those of two results are found to be the same. units: (N,) the
    independent unit that each belongs to, such as its episode. truths: what must be the same for a trial in all
    results, such as its label. scores: by name of a measure float (N, 2), of which the sums' ratio is the score; the
    second column depends on the truths alone. counted: what it counts, where that is not trials. floors: by name of a
    measure (N,), what saying nothing but "stop" would have in the first column.
    """

    kind: str
    noun: str
    truth_noun: str
    settings: Mapping[str, Any]
    about: Mapping[str, Any]
    measures: Sequence[Measure]
    keys: Sequence[str]
    units: np.ndarray
    truths: Sequence[Any]
    scores: Mapping[str, np.ndarray]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    left_out: int = 0
    counted: str = ""
    unit_noun: str = "episode"
    floors: Mapping[str, np.ndarray] = field(default_factory=dict)


def read_report(folder: Path) -> dict[str, Any]:
    """report.json of a finished result. Raises DataError."""
    try:
        return read_json_object(folder / "report.json")
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: report.json cannot be read ({error})") from None


def describe_making(report: Mapping[str, Any], policy: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison repeats of a result: its policy, versions, git and machine."""
    return {"policy": dict(policy), **tell_making(report)}


def stack_scores(columns: Mapping[str, tuple[Any, Any]]) -> dict[str, np.ndarray]:
    """By name of a measure (what was reached, what could be), (N,) each -> the `scores` of Trials."""
    return {name: np.stack(pair, axis=1).astype(np.float64) for name, pair in columns.items()}


def compare(results: Sequence[Trials], names: Sequence[str]) -> dict[str, Any]:
    """JSON values: "results", and "measures", each with the "scores" of the results and the "pairs" of them.

    names: of the results. A score is {value, interval}; a pair {first, second, difference (first - second), interval,
    p_value, p_holm}, Holm's over the pairs of the measure. A measure without a trial has no scores and no pairs.
    Raises DataError, with the reason, for results that cannot be compared.
    """
    places = find_shared(results, names)
    first = results[0]
    units, unit = np.unique(first.units[places[0]], return_inverse=True)
    measures = []
    for measure in first.measures:
        if not all(measure.name in result.scores for result in results):
            continue  # a task that is not in all of them
        trials = [result.scores[measure.name][place] for result, place in zip(results, places, strict=True)]
        told = {**vars(measure), **_compare_measure(trials, unit, len(units), measure.is_share)}
        if told["n"] and measure.name in first.floors:
            told["floor"] = float(first.floors[measure.name][places[0]].sum() / told["n"])
        measures.append(told)
    told = [
        {
            "letter": letter,
            "name": name,
            "trials": len(result.keys),
            "left_out": result.left_out,
            "conditions": dict(result.conditions),
            "made_with": dict(result.about),
        }
        for letter, name, result in zip(LETTERS, names, results, strict=False)
    ]
    return {
        "kind": first.kind,
        "noun": first.noun,
        "unit_noun": first.unit_noun,
        "counted": first.counted or f"{first.noun}s",
        "settings": dict(first.settings),
        "trials": len(places[0]),
        "units": len(units),
        "results": told,
        "measures": measures,
    }


def find_shared(results: Sequence[Trials], names: Sequence[str]) -> list[np.ndarray]:
    """For each result the indices of the trials that all have, in the order of the first; raises as `compare`."""
    first, first_name = results[0], names[0]
    for result, name in zip(results[1:], names[1:], strict=True):
        _refuse_other_settings(first, result, first_name, name)
    indices = [{key: index for index, key in enumerate(result.keys)} for result in results]
    shared = [key for key in first.keys if all(key in index for index in indices)]
    if not shared:
        said = "; ".join(f"{name} has {_show_keys(r.keys)}" for name, r in zip(names, results, strict=True))
        raise DataError(f"the results share no {first.noun}, so none can be compared with its like: {said}")
    for result, name, index in zip(results[1:], names[1:], indices[1:], strict=True):
        differing = [key for key in shared if first.truths[indices[0][key]] != result.truths[index[key]]]
        if differing:
            key = differing[0]
            there, here = first.truths[indices[0][key]], result.truths[index[key]]
            raise DataError(
                f"{first_name} and {name} disagree on {len(differing)} of {len(shared)} {first.truth_noun}s, first on "
                f"{key}: {there!r} and {here!r}; both must be of the same data or scenes"
            )
    return [np.array([index[key] for key in shared]) for index in indices]


def _refuse_other_settings(first: Trials, other: Trials, first_name: str, name: str) -> None:
    if first.kind != other.kind:
        raise DataError(f"{first_name} is a result of `{first.kind}` and {name} one of `{other.kind}`")
    differing = [
        f"{key} is {json.dumps(first.settings[key])} in {first_name} and {json.dumps(other.settings[key])} in {name}"
        for key in first.settings
        if first.settings[key] != other.settings[key]
    ]
    if differing:
        raise DataError(f"these results cannot be compared: {'; '.join(differing)}")


def _show_keys(keys: Sequence[str]) -> str:
    return f"{keys[0]} to {keys[-1]}" if keys else "none"


def _compare_measure(trials: Sequence[np.ndarray], unit: np.ndarray, num_units: int, is_share: bool) -> dict[str, Any]:
    """trials: (N, 2) of each result. unit: int (N,), the unit of each trial.

    Intervals are Wilson's and Newcombe's where every unit is one trial that succeeds or fails, else by bootstrap over
    units.
    """
    sums = []
    for scores in trials:
        total = np.zeros((num_units, 2))
        np.add.at(total, unit, scores)
        sums.append(total)
    wholes = sums[0][:, 1]
    used = wholes > 0
    if not used.any():
        return {"n": 0, "scores": [], "pairs": []}
    parts, wholes = [total[used, 0] for total in sums], wholes[used]
    are_binary = [is_share and bool((wholes == 1).all() and np.isin(part, (0, 1)).all()) for part in parts]
    pairs = []
    for first, second in itertools.combinations(range(len(parts)), 2):
        lead = parts[first] - parts[second]
        if are_binary[first] and are_binary[second]:
            interval = find_paired_interval(parts[first].astype(bool), parts[second].astype(bool))
        else:
            interval = _bootstrap(lead, wholes)
        pairs.append(
            {
                "first": LETTERS[first],
                "second": LETTERS[second],
                "difference": float(lead.sum() / wholes.sum()),
                "interval": interval,
                "p_value": permutation_test(lead, _SEED),
            }
        )
    for pair, adjusted in zip(pairs, adjust_holm([pair["p_value"] for pair in pairs]), strict=True):
        pair["p_holm"] = adjusted
    scores = [
        {
            "value": float(part.sum() / wholes.sum()),
            "interval": list(wilson(part.sum(), len(part))) if is_binary else _bootstrap(part, wholes),
        }
        for part, is_binary in zip(parts, are_binary, strict=True)
    ]
    return {"n": int(wholes.sum()), "scores": scores, "pairs": pairs}


def _bootstrap(part: np.ndarray, wholes: np.ndarray) -> list[float] | None:
    """None where all units agree: drawing them anew says nothing of how far others may lie."""
    ratios = part / wholes
    return None if np.allclose(ratios, ratios[0]) else bootstrap_ratio(part, wholes, _SEED)


def format_comparison(result: Mapping[str, Any]) -> str:
    """`compare` as a table for a terminal: a line a measure, and for more than two results a line a pair."""
    lines = [f"{told['letter']} {told['name']}" for told in result["results"]]
    lines += [describe_trials(result), *describe_conditions(result)]
    several = len(result["results"]) > 2
    width = max(18, *(len(measure["name"]) + 1 for measure in result["measures"]))
    lines += ["", _format_head(result, several, width)]
    for measure in result["measures"]:
        pairs = [] if several else measure["pairs"]
        lines.append(_format_scores(measure, width) + "".join(_format_pair(measure, pair) for pair in pairs))
    if several:
        lines += ["", f"{'':{width}}{'pair':>9}{'difference':>12}  {'95 %':>16}{'p':>9}{'Holm':>9}"]
        lines += [
            f"{measure['name']:{width}}{pair['first'] + ' - ' + pair['second']:>9}{_format_pair(measure, pair)}"
            f"{format_p(pair['p_holm']):>9}"
            for measure in result["measures"]
            for pair in measure["pairs"]
        ]
    return "\n".join([*lines, "", describe_methods(result)])


def describe_methods(result: Mapping[str, Any]) -> str:
    """How intervals and p-values were found, in sentences."""
    lower = [measure["name"] for measure in result["measures"] if measure["lower_is_better"]]
    sentences = [
        f"n: {result['counted']}.",
        "Differences of shares are in percentage points.",
        "Intervals: 95 %; Wilson's and Newcombe's where a unit is one success or failure, else bootstrap over units "
        "(none where all units agree).",
        "p: two-sided permutation test over units, one test a line.",
    ]
    if len(result["results"]) > 2:
        sentences.append("Holm: p-values of the pairs of a measure, adjusted by Holm's method.")
    floors = [
        f"{measure['name']} {format_score(measure, measure['floor'])}"
        for measure in result["measures"]
        if "floor" in measure
    ]
    if floors:
        sentences.append(f'"stop" alone scores: {", ".join(floors)}.')
    if lower:
        sentences.append(f"Lower is better: {', '.join(lower)}.")
    return "\n".join(sentences)


def _format_head(result: Mapping[str, Any], several: bool, width: int) -> str:
    head = f"{'':{width}}{'n':>7}" + "".join(f"{told['letter']:>9}" for told in result["results"])
    return head if several else head + f"{'A - B':>12}  {'95 %':>16}{'p':>9}"


def _format_scores(measure: Mapping[str, Any], width: int) -> str:
    shown = "".join(f"{format_score(measure, score['value']):>9}" for score in measure["scores"])
    return f"{measure['name']:{width}}{measure['n']:7}{shown}"


def _format_pair(measure: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    difference, interval = format_difference(measure, pair)
    return f"{difference:>12}  {interval:>16}{format_p(pair['p_value']):>9}"


def format_score(measure: Mapping[str, Any], value: float) -> str:
    return format_share(value) if measure["is_share"] else format_fixed(value, _DECIMALS)


def format_score_span(measure: Mapping[str, Any], interval: Interval) -> str:
    return format_span(interval, 1) if measure["is_share"] else format_range(interval, _DECIMALS)


def format_difference(measure: Mapping[str, Any], pair: Mapping[str, Any]) -> tuple[str, str]:
    """The difference and its interval."""
    if measure["is_share"]:
        return format_points(pair["difference"], 1, "+"), format_span(pair["interval"], 1, "+")
    return format_fixed(pair["difference"], _DECIMALS, "+"), format_range(pair["interval"], _DECIMALS, "+")
