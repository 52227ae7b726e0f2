"""What `tune` tries, rung after rung: the entries of RUNGS."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_local.errors import ConfigError, suggest
from vlm_local.marks import MARKS

EXAMPLES = "examples.json"  # in the result's folder: the episodes that may give examples

Setting = Mapping[str, Any]  # options by their names in PolicyOptions, those that differ from the base's


@dataclass(frozen=True)
class Base:
    """What the variants of a rung depend on. prompt, grammar: names of the base's. prompts: to try, the user's own."""

    prompt: str
    grammar: str
    prompts: Sequence[str]


@dataclass(frozen=True)
class Rung:
    """about: in words, for tables. list_variants: what is tried, of which one is kept or none.

    list_variants raises ConfigError, with the reason, where there is nothing to try. It need not look whether a model
    takes a variant (its family may read one picture only): the options refuse it with their own reason.
    """

    name: str
    about: str
    list_variants: Callable[[Base], Sequence[Setting]]


def _list_prompts(base: Base) -> Sequence[Setting]:
    shipped = ["brief"] if base.prompt == "chat" else []
    if not shipped and not base.prompts:
        raise ConfigError(f"the prompt “{base.prompt}” is the model's own; --prompts FILE,FILE tries others")
    return [{"prompt": name} for name in (*shipped, *base.prompts)]


def _list_grammars(base: Base) -> Sequence[Setting]:
    if base.grammar != "primitives":
        raise ConfigError(f"the grammar {base.grammar} was chosen, which has its own words")
    return [{"grammar": "primitives_slightly"}]


RUNGS = (
    Rung("prompt", "another prompt", _list_prompts),
    Rung("grammar", "“slightly” as a word", _list_grammars),
    Rung("marks", "marks in the picture", lambda base: [{"marks": kind} for kind in MARKS]),
    Rung(
        "examples",
        "examples of other episodes",
        lambda base: [
            {"examples": f"{EXAMPLES}:{num}", "example_choice": choice}
            for num, choice in ((4, "fixed"), (8, "fixed"), (8, "nearest"))
        ],
    ),
    Rung(
        "frames",
        "past frames, one a second at 5 Hz",
        lambda base: [{"frames": num, "frame_every": 5} for num in (1, 4)],
    ),
    Rung("history", "its own last phrases", lambda base: [{"history": num} for num in (2, 8)]),
    Rung(
        "think",
        "reasons first, written once a second at 5 Hz",
        lambda base: [{"think": "ecot", "think_every": 5, "think_tokens": 200}],
    ),
    Rung(
        "contrast", "less of what it says to a blank picture", lambda base: [{"contrast": a} for a in (0.25, 0.5, 1.0)]
    ),
)


def find_rungs(names: str | None) -> tuple[Rung, ...]:
    """names: joined by commas, None for all; they are tried in the order of RUNGS. Raises ConfigError."""
    known = {rung.name: rung for rung in RUNGS}
    wanted = list(known) if names is None else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--rungs: there is no {name!r}{suggest(name, known)}; choose from {', '.join(known)}")
    return tuple(rung for rung in RUNGS if rung.name in wanted)


def describe_setting(setting: Setting) -> str:
    """As its flags say it: "contrast 0.5", "examples 8, example-choice nearest"; "base" for none."""
    shown = {name: str(value).removeprefix(f"{EXAMPLES}:") for name, value in setting.items()}
    return ", ".join(f"{name.replace('_', '-')} {value}" for name, value in shown.items()) or "base"
