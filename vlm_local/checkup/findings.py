"""Results of stages -> plain sentences. A stage that failed has a result with `failed`, the reason."""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_local.lab.formats import format_fixed, format_share

Result = Mapping[str, Any]

_ONE_SIDED = 0.8  # of the pictures; those of the simulator call for many phrases
_TURNS = 0.2  # of 1, which is an answer that turns wholly with its scene
_PERIOD_MS = 200.0  # 5 Hz


def describe(stage: str, result: Result) -> str:
    """One sentence, or a few, about one stage."""
    if "failed" in result:
        return f"It could not be found out: {result['failed']}"
    return _DESCRIBE[stage](result)


def conclude(results: Mapping[str, Result]) -> list[str]:
    """What was found by all stages that are there, by name."""
    found = [describe(stage, result) for stage, result in results.items()]
    return found + _judge_sight(results)


def is_faulty(results: Mapping[str, Result]) -> bool:
    """Whether a stage failed, or the decoder said something else than it should."""
    wrong = results.get("decoding", {}).get("disagreements but near ties")
    return bool(wrong) or any("failed" in result for result in results.values())


def _describe_loads(result: Result) -> str:
    size, place = result["memory_bytes"] / 1e9, f"{result['dtype']} on {result['device']}"
    return f"It loads in {result['load_s']:.1f} s: {size:.3g} GB in {place}."


def _describe_decoding(result: Result) -> str:
    wrong, ties = result["disagreements but near ties"], result["disagreements"]
    if wrong:
        text = f"Its decoder is WRONG here: outlines says something else to {wrong} of {result['pictures']} pictures."
    else:
        text = f"Its decoder says what outlines says, on {result['pictures']} pictures"
        text += f", but for {ties} near tie{'s' * (ties != 1)}." if ties else "."
    return f"{text} It is {result['outlines_ms'] / result['ms']:.1f} times as fast."


def _describe_speed(result: Result) -> str:
    ms, least = result["ms"], result["least_ms"]
    text = f"It answers in {ms['p50']:.3g} ms (p95 {ms['p95']:.3g}), {ms['p50'] / least:.1f} times the computed limit"
    text += f" of this machine ({least:.2g} ms)."
    return text if ms["p95"] <= _PERIOD_MS else f"{text} That is too slow for a robot at 5 Hz."


def _describe_spatial(result: Result) -> str:
    told = [format_fixed(result[name]["value"]) for name in ("turned", "moved", "left")]
    text = "In {} changed scenes its answer turns by {} where 1 is right, moves by {} and stays sure by {} where 0 is."
    return text.format(result["scenes"], *told)


def _describe_eval(result: Result) -> str:
    return (
        f"Of {result['steps']} recorded steps it says the label exactly in {format_share(result['exact'])}; "
        f"repeating the last label, {format_share(result['repeat_last'])}."
    )


def _describe_sim(result: Result) -> str:
    text = f"In the simulator it solves {result['won']} of {result['played']} episodes of {result['tasks']} tasks, "
    text += f"the oracle {result['oracle']}, random phrases {result['random']}."
    return text if not result["faulted"] else f"{text} {result['faulted']} faulted."


_DESCRIBE: dict[str, Callable[[Result], str]] = {
    "loads": _describe_loads,
    "decoding": _describe_decoding,
    "speed": _describe_speed,
    "spatial": _describe_spatial,
    "eval": _describe_eval,
    "sim": _describe_sim,
}


def _judge_sight(results: Mapping[str, Result]) -> list[str]:
    """Whether the answers depend on what is seen; one that turns with its scene does, however one-sided it is."""
    turned = results.get("spatial", {}).get("turned", {}).get("value")
    if turned is not None and turned >= _TURNS:
        return []
    pictures, found = results.get("decoding", {}), []
    said = pictures.get("most_said")
    if said and said["share"] >= max(_ONE_SIDED, pictures["most_right"]["share"]):
        shares = [format_share(pictures[name]["share"], decimals=0) for name in ("most_said", "most_right")]
        text = "It says '{}' to {} of pictures, where no phrase is right for more than {}: it does not look."
        found.append(text.format(said["phrase"], *shares))
    if turned is not None:
        found.append("Its answer does not turn with the scene, so it does not read places from the picture.")
    return found
