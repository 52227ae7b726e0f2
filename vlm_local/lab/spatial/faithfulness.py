"""Does reasoning decide the answer, and does an old one stop deciding it? Answers behind reasoning on other scenes.

Each case is an episode of two steps: the model writes about the first view and answers the second.

- own: both are the scene itself. changed: both are the scene with the colours of two blocks swapped, which turns the
  right answer.
- swapped: the first view is another scene, with another right answer. Where reasoning decides anything, the answer is
  another one than behind its own reasoning.
- stale: the first view is the scene, the second the changed one. Where the answer behind fresh reasoning ("changed")
  differs from "own", it must differ here, too: a stale thought must not freeze it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_local.errors import ConfigError, EngineError
from vlm_local.lab.spatial.scenes import NONE
from vlm_local.lab.spatial.sets import Gallery, View
from vlm_local.lab.statistics import describe_rate
from vlm_local.policy import Policy, derive_seed

CHANGE = "swap-colours"  # the words stay, the right answer turns on two axes
REASONING = "reasoning.jsonl"  # the rows, in the study's folder
CASES = ("own", "changed", "swapped", "stale")


@dataclass(frozen=True)
class Case:
    """first, second: (scene, change) of the views; of the first, the model writes."""

    scene: int
    name: str
    first: tuple[int, str]
    second: tuple[int, str]

    @property
    def key(self) -> dict[str, Any]:
        """What tells its row from others."""
        return {"scene": self.scene, "case": self.name, "first": list(self.first), "second": list(self.second)}


def list_cases(rights: Sequence[str]) -> Iterator[Case]:
    """rights: of each scene the right phrase. The other scene of "swapped" stays the same where scenes are added."""
    for scene, right in enumerate(rights):
        same, changed = (scene, NONE.name), (scene, CHANGE)
        others = [*range(scene - 1, -1, -1), *range(scene + 1, len(rights))]
        other = next((other for other in others if rights[other] != right), None)
        yield Case(scene, "own", same, same)
        yield Case(scene, "changed", changed, changed)
        if other is not None:
            yield Case(scene, "swapped", (other, NONE.name), same)
        yield Case(scene, "stale", same, changed)


def find_rights(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of the study's rows, each scene's right phrase as it is."""
    found = {row["scene"]: row["right"] for row in rows if row["change"] == NONE.name}
    return [found[scene] for scene in sorted(found)]


def check_alone(metadata: Mapping[str, Any]) -> None:
    """Raises ConfigError where the prompt shows more of the first view than reasoning. metadata: of the policy."""
    shown = [name for name in ("frames", "history") if metadata.get(name)]
    if shown:
        flags = " and ".join(f"--{name}" for name in shown)
        raise ConfigError(f"with --think, `spatial` shows reasoning about another scene alone: leave out {flags}")


def ask_cases(
    gallery: Gallery,
    policy: Policy,
    rights: Sequence[str],
    progress: Callable[[int], object],
    known: Sequence[Mapping[str, Any]],
    keep: Callable[[Mapping[str, Any]], None],
) -> list[dict[str, Any]]:
    """A row for each case: its key, reasoning and phrase. known: rows that are kept; keep: gets new ones."""
    told = {(row["scene"], row["case"]): row for row in known}
    rows = []
    for case in list_cases(rights):
        row = told.get((case.scene, case.name))
        if row is None:
            row = case.key | _play(policy, gallery.show(*case.first), gallery.show(*case.second), case)
            keep(row)
        elif not case.key.items() <= row.items():
            raise ConfigError(f"reasoning.jsonl was made with other scenes: {case.key} is asked; choose another --out")
        rows.append(dict(row))
        progress(1)
    return rows


def _play(policy: Policy, first: View, second: View, case: Case) -> dict[str, Any]:
    policy.reset(derive_seed(0, "spatial", case.scene))
    policy.act(first.observation)
    decision = policy.act(replace(second.observation, step=1))
    if decision.fault or decision.phrase is None:
        raise EngineError(f"the policy failed on {case.key}: {decision.fault or 'it said no phrase'}")
    return {"phrase": decision.phrase, "reasoning": decision.extra.get("reasoning")}


def score_cases(rows: Sequence[Mapping[str, Any]], rights: Sequence[str]) -> dict[str, Any]:
    """Shares of scenes with Wilson's intervals, as describe_rate gives them; of scenes whose cases all had reasoning.

    swapped_turns: another answer behind another scene's reasoning; near 1 where reasoning decides, 0 where it is for
    show. stale_freezes: of the scenes whose answer turns behind fresh reasoning, those where it stays as it was behind
    a stale one; 0 is right. without: scenes left out because the model wrote nothing. Raises ValueError for rows that
    are not those of these scenes.
    """
    told = {(row["scene"], row["case"]): row for row in rows}
    wanted = {(case.scene, case.name): case.key for case in list_cases(rights)}
    if len(told) != len(rows) or wanted != {key: _read_key(row) for key, row in told.items()}:
        raise ValueError("reasoning.jsonl has not the cases of these scenes, each once")
    swapped: list[bool] = []
    frozen: list[bool] = []
    num_without = 0
    for scene in range(len(rights)):
        here = {name: told[scene, name] for name in CASES if (scene, name) in told}
        if not all(row["reasoning"] for row in here.values()):
            num_without += 1
            continue
        said = {name: row["phrase"] for name, row in here.items()}
        if "swapped" in said:
            swapped.append(said["swapped"] != said["own"])
        if said["changed"] != said["own"]:
            frozen.append(said["stale"] == said["own"])
    return {
        "swapped_turns": describe_rate(sum(swapped), len(swapped)),
        "stale_freezes": describe_rate(sum(frozen), len(frozen)),
        "without": num_without,
    }


def tell_cases(scores: Mapping[str, Any]) -> list[str]:
    """The two shares as lines of a table."""
    lines = []
    for name, right in (("swapped_turns", 1), ("stale_freezes", 0)):
        line = scores[name]
        low, high = line["interval"]
        told = f"{line['count']} of {line['n']}  {low:.2f} to {high:.2f}" if line["n"] else "no scene says it"
        lines.append(f"{name}: {told}; should be {right}")
    return lines


def _read_key(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("scene", "case", "first", "second")}
