"""A recorded episode answered again by another policy, step by step."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.actions import find_first_command
from vlm_local.data.runs import RecordedEpisode, RunWriter
from vlm_local.errors import DataError, EngineError, RequestError
from vlm_local.policy import Policy
from vlm_local.primitives import TRANSITIONS, format_phrase, label_window
from vlm_local.types import Decision, Observation
from vlm_local.wire import build_details


@dataclass(frozen=True)
class ReplayedStep:
    """recorded, answered: phrases, or None where there was none; problem: why not; decision: the answer itself."""

    step: int
    recorded: str | None
    answered: str | None
    problem: str | None = None
    decision: Decision | None = None

    @property
    def differs(self) -> bool:
        return self.recorded != self.answered


def replay_episode(episode: RecordedEpisode, policy: Policy, seed: int) -> Iterator[ReplayedStep]:
    """Every recorded observation answered again; what was recorded is what the next one follows from.

    seed: where the recording has none. A policy that only acts answers with the phrase of its action
    carried out for TRANSITIONS steps.
    """
    recorded_seed = episode.meta.get("seed")
    policy.reset(int(seed if recorded_seed is None else recorded_seed))
    opened = None
    for index, line in enumerate(episode.lines):
        step = line.get("step", index)  # a step that was not recorded leaves a gap
        proprio = line.get("proprio")
        proprio = None if proprio is None else np.array(proprio, np.float64)
        if opened is None:
            opened = find_first_command(None if proprio is None else proprio[6]) > 0.5
        try:
            image, instruction = episode.load_image(index), str(line.get("instruction") or "")
            decision = policy.act(Observation(image, instruction, proprio, step))
        except (DataError, EngineError, RequestError) as error:
            yield ReplayedStep(step, line.get("phrase"), None, str(error))
            continue
        answered = None if decision.fault else decision.phrase or _name_action(decision, opened)
        opened = decision.action[6] > 0.5
        yield ReplayedStep(step, line.get("phrase"), answered, decision.fault, decision)


def count_reasoned(lines: Sequence[Mapping[str, Any]], steps: Sequence[ReplayedStep]) -> tuple[int, int]:
    """Steps whose prompt showed reasoning: of those recorded, and of their replay."""
    extras = [line.get("extra") for line in lines]
    recorded = sum(bool(isinstance(extra, Mapping) and extra.get("reasoning")) for extra in extras)
    return recorded, sum(bool(step.decision and step.decision.extra.get("reasoning")) for step in steps)


def tell_reasoned(recorded: int, replayed: int) -> str:
    """What a replay must say of reasoning; "" where there was none on either side."""
    if not recorded and not replayed:
        return ""
    counts = f"reasoning was shown at {recorded} recorded and {replayed} replayed steps"
    if not replayed:
        return f"{counts}: this replay is without thoughts, so its answers may differ for that alone (--think)"
    return f"{counts}: it was written anew, and not at the same steps"


def record_replay(writer: RunWriter, episode: RecordedEpisode, steps: Sequence[ReplayedStep], model: str) -> None:
    """Write the answers as an episode of the same name; the pictures stay in the recording."""
    number = int(Path(episode.source).name.rpartition("-")[2])
    writer.start_episode(episode.robot, {"replay_of": Path(episode.source).name}, number)
    for step, line in zip(steps, episode.lines, strict=True):
        decision = step.decision or Decision(np.zeros(7), fault=step.problem)
        details = build_details(decision, model=model, robot=episode.robot, episode=number, step=step.step)
        seen = {name: line.get(name) for name in ("time", "instruction", "proprio")}
        writer.add_step({**details, **seen}, None)
    writer.end_episode(episode.robot)


def _name_action(decision: Decision, opened: bool) -> str:
    motion = np.append(TRANSITIONS * decision.action[:6], float(decision.action[6] > 0.5) - float(opened))
    return format_phrase(label_window(np.stack([np.zeros(7), motion])))
