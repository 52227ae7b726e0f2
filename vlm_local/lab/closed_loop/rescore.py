"""The report of `sim`, once more from the actions in its episodes: they are carried out again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.environments import find_suite, name_episode
from vlm_local.errors import DataError
from vlm_local.files import read_json_lines, read_json_object
from vlm_local.lab.closed_loop.environment import Environment
from vlm_local.lab.closed_loop.run import RolloutPlan
from vlm_local.lab.closed_loop.scores import score_run

_UNSEEN_PX = 64  # no picture is drawn


def rescore(folder: Path, report: dict[str, Any], progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the report must be: fields that were scored again, and fields that only say how it was made.

    Episodes are played again but for those that faulted, which no rate counts."""
    meta = read_json_object(folder / "meta.json")
    plan = RolloutPlan(**meta["simulator"])
    environment = Environment(plan.env, plan.level, _UNSEEN_PX)
    episodes = []
    total = len(plan.list_episodes())
    for told, lines in _read_episodes(folder, plan):
        again = {} if told["outcome"] == "faulted" else replay_episode(environment, told, lines, plan.max_steps)
        differing = [name for name, value in again.items() if told.get(name) != value]
        if differing:
            name = differing[0]
            raise DataError(
                f"episode {told['task']}-{told['number']} says {name} {told.get(name)!r}; played again from its seed "
                f"and actions, it is {again[name]!r}. It was changed, or played by another version of the simulator "
                f"(recorded with mujoco {meta.get('versions', {}).get('mujoco')})"
            )
        episodes.append(told | again)
        progress(len(episodes), total)
    return score_run(episodes, find_suite(plan.env).stages_of(plan.tasks)), meta


def _read_episodes(folder: Path, plan: RolloutPlan) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """meta.json and the lines of steps.jsonl of every episode of the plan; each must be there, with its seed."""
    for task, number in plan.list_episodes():
        place = folder / "episodes" / name_episode(task, number)
        told = read_json_object(place / "meta.json")
        wanted = {"task": task, "number": number, "level": plan.level, "seed": plan.seed + number}
        if {name: told.get(name) for name in wanted} != wanted:
            raise DataError(f"{place.name}/meta.json is of another episode than {wanted}")
        lines = list(read_json_lines(place / "steps.jsonl"))
        if told["outcome"] != "faulted" and len(lines) != told["steps"]:
            raise DataError(f"{place.name} has {len(lines)} lines in steps.jsonl and says {told['steps']} steps")
        yield told, lines


def replay_episode(
    environment: Environment, ended: Mapping[str, Any], lines: Sequence[Mapping], max_steps: int
) -> dict:
    """The outcome that these actions have, with the oracle's and random phrases' steps on the same episode.

    environment: of the run's level. ended: what the run says of the episode. lines: of its steps.jsonl.
    Returns the fields of `ended` that follow from physics; `steps` ends where the episode does.
    """
    task, seed = ended["task"], ended["seed"]
    state = environment.reset(task, seed, drawn=False)
    instruction, steps, agreed = state.observation.instruction, 0, 0
    for line in lines[:max_steps]:
        if state.ended:
            break
        agreed += line["phrase"] == state.oracle
        state, steps = environment.step(np.array(line["action"], np.float64)), steps + 1
    found = {
        "instruction": instruction,
        "outcome": state.ended or ("late" if steps == max_steps else "unfinished"),
        "steps": steps,
        "stage": state.stage,
        "agreed": agreed,
        "oracle_steps": environment.count_steps("oracle", task, seed, max_steps),
    }
    if "random_steps" in ended:
        found["random_steps"] = environment.count_steps("random", task, seed, max_steps)
    return found
