"""A recorded episode answered again by another policy, step by step."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm_local.actions import OPEN_THRESHOLD
from vlm_local.data.runs import RecordedEpisode
from vlm_local.errors import DataError, EngineError, RequestError
from vlm_local.policy import Policy
from vlm_local.primitives import TRANSITIONS, format_phrase, label_window
from vlm_local.types import Decision, Observation


@dataclass(frozen=True)
class ReplayedStep:
    """recorded, answered: phrases, or None where there was none; problem: why not."""

    step: int
    recorded: str | None
    answered: str | None
    problem: str | None = None

    @property
    def differs(self) -> bool:
        return self.recorded != self.answered


def replay_episode(episode: RecordedEpisode, policy: Policy, seed: int) -> Iterator[ReplayedStep]:
    """Every recorded observation answered again; what was recorded is what the next one follows from.

    seed: where the recording has none. A policy that only acts answers with the phrase of its action
    carried out for TRANSITIONS steps.
    """
    policy.reset(int(episode.meta.get("seed") or seed))
    opened = None
    for step, line in enumerate(episode.lines):
        proprio = line.get("proprio")
        proprio = None if proprio is None else np.array(proprio, np.float64)
        if opened is None:
            opened = proprio is None or proprio[6] >= OPEN_THRESHOLD
        try:
            observation = Observation(episode.load_image(step), str(line.get("instruction") or ""), proprio)
            decision = policy.act(observation)
        except (DataError, EngineError, RequestError) as error:
            yield ReplayedStep(step, line.get("phrase"), None, str(error))
            continue
        answered = None if decision.fault else decision.phrase or _name_action(decision, opened)
        opened = decision.action[6] > 0.5
        yield ReplayedStep(step, line.get("phrase"), answered, decision.fault)


def _name_action(decision: Decision, opened: bool) -> str:
    motion = np.append(TRANSITIONS * decision.action[:6], float(decision.action[6] > 0.5) - float(opened))
    return format_phrase(label_window(np.stack([np.zeros(7), motion])))
