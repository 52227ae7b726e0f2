"""A recorded episode once more, from its seed and its actions: did it come out as it says?"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_local.lab.closed_loop.player import Player


def replay_episode(player: Player, ended: Mapping[str, Any], lines: Sequence[Mapping], max_steps: int) -> dict:
    """The outcome that these actions have, with the oracle's and random phrases' steps on the same episode.

    player: of the run's level. ended: what the run says of the episode. lines: of its steps.jsonl.
    Returns the fields of `ended` that follow from physics; `steps` ends where the episode does.
    """
    task, seed = ended["task"], ended["seed"]
    scene = player.reset(task, seed, drawn=False)
    instruction, steps, agreed = scene.observation.instruction, 0, 0
    for line in lines[:max_steps]:
        if scene.success or scene.lost:
            break
        agreed += line["phrase"] == scene.oracle
        scene, steps = player.step(np.array(line["action"], np.float64)), steps + 1
    outcome = "success" if scene.success else "lost" if scene.lost else "late"
    found = {
        "instruction": instruction,
        "outcome": outcome if scene.success or scene.lost or steps == max_steps else "unfinished",
        "steps": steps,
        "stage": scene.stage,
        "agreed": agreed,
        "oracle_steps": player.count_oracle_steps(task, seed, max_steps),
    }
    if "random_steps" in ended:
        found["random_steps"] = player.count_random_steps(task, seed, max_steps)
    return found
