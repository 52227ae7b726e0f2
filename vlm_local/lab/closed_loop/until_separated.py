"""Two policies on the same episodes of the simulator, until they are told apart or the episodes are used up.

DIR/A and DIR/B are ordinary results of `sim`, which grow by a few episodes of each task in turn: first one policy, then
the other, and the other way round the next time. Both measures are tested after every pair, each at half of ALPHA.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.errors import DataError
from vlm_local.files import write_json
from vlm_local.lab.closed_loop.run import RolloutPlan, run_rollouts
from vlm_local.lab.closed_loop.trials import DECISION, load_trials
from vlm_local.lab.comparison import Trials, find_shared
from vlm_local.lab.sequential import ALPHA, find_confidence_interval, find_decision, grow_capital
from vlm_local.lab.sources import PolicySource
from vlm_local.provenance import describe_machine

MEASURES = ("success", "progress")
ALPHA_EACH = ALPHA / len(MEASURES)
LETTERS = ("A", "B")
_EPISODES_AT_ONCE = 5  # of each task and policy, until the other plays

Progress = Callable[[Mapping[str, Any]], None]


def play_until_separated(
    path: Path, plans: Sequence[RolloutPlan], sources: Sequence[PolicySource], workers: int, progress: Progress
) -> dict[str, Any]:
    """Play both plans, which differ in their policy alone, until `decide` tells; at most plan.episodes of each task.

    progress: is given each decision on the way. Writes DIR/decision.json and returns it. Raises ConfigError where the
    folder holds other results, DataError where an episode got no answer from its policy.
    """
    most = plans[0].episodes
    decision: dict[str, Any] = {}
    for turn, num in enumerate(range(_EPISODES_AT_ONCE, most + _EPISODES_AT_ONCE, _EPISODES_AT_ONCE)):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        for side in order:
            plan = replace(plans[side], episodes=min(num, most))
            run_rollouts(path / LETTERS[side], plan, sources[side], workers)
        num_tasks = len(plans[0].tasks)
        decision = decide([load_trials(path / letter) for letter in LETTERS], min(num, most) * num_tasks, num_tasks)
        progress(decision)
        if decision["winner"]:
            break
    policies = {letter: plan.policy for letter, plan in zip(LETTERS, plans, strict=True)}
    told = {"policies": policies, "most_episodes": most, **decision, **describe_machine()}
    write_json(path / DECISION, told)
    return told


def decide(results: Sequence[Trials], num_pairs: int, num_tasks: int) -> dict[str, Any]:
    """Which of two results is better, if that can be said.

    num_tasks: of which each seed has an episode. Returns JSON values: "winner" ("A", "B" or None), "by" (the measure
    that told), "after" (its pairs), "pairs", and for each measure the means of both, their difference, its interval at
    all times, and the largest capital of the bet. Raises DataError where fewer than num_pairs pairs were played without
    a fault: a comparison without the others favours the policy that fails.
    """
    places = find_shared(results, LETTERS)
    if len(places[0]) < num_pairs:
        raise DataError(
            f"{num_pairs - len(places[0])} of {num_pairs} pairs of episodes got no answer from a policy, and a "
            "decision without them could favour the one that fails; mend that, and the same command plays them again"
        )
    measures, decided = {}, []
    num_played = len(places[0])
    for name in MEASURES:
        scores = [result.scores[name][place] for result, place in zip(results, places, strict=True)]
        leads = _sort_by_seed([results[0].keys[at] for at in places[0]], scores[0][:, 0] - scores[1][:, 0])
        after = int(find_decision(leads, ALPHA_EACH, num_tasks))
        measures[name] = {
            **{letter: float(score[:, 0].mean()) for letter, score in zip(LETTERS, scores, strict=True)},
            "difference": float(leads.mean()),
            "interval": find_confidence_interval(leads, ALPHA_EACH, num_tasks),
            "capital": float(np.exp(min(grow_capital(leads)[num_tasks - 1 :: num_tasks].max(), 700.0))),
        }
        if after:
            decided.append((after, name, LETTERS[0] if leads[:after].sum() > 0 else LETTERS[1]))
    after, by, winner = min(decided, key=lambda told: told[0], default=(None, None, None))
    return {"winner": winner, "by": by, "after": after, "pairs": num_played, "alpha": ALPHA, "measures": measures}


def _sort_by_seed(keys: Sequence[Any], leads: np.ndarray) -> np.ndarray:
    """In the order of play, in which later pairs come after all that were there before."""
    return leads[np.argsort([int(key.rpartition(" ")[2]) for key in keys], kind="stable")]
