"""A server with the embedded model in a process of its own, and a simulated robot that asks it at a robot's pace."""

import itertools
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vlm_local.environments import OURS
from vlm_local.errors import ConfigError
from vlm_local.lab.closed_loop.process import EnvironmentProcess
from vlm_local.processes import end_process
from vlm_local.remote_policy import RemotePolicy
from vlm_local.sim.tasks import TASKS

_STEP_S = 0.2  # 5 Hz, as AutoEval's station
_MAX_STEPS = 70  # as AutoEval's
_REST_S = 1.0  # between episodes, so that one sees how the last one ended


@dataclass(frozen=True)
class DemoEpisode:
    """outcome: "success", "lost" or "late"."""

    instruction: str
    outcome: str
    num_steps: int


@contextmanager
def open_server(port: int) -> Iterator[str]:
    """Its URL, once the model is loaded. Raises ConfigError where it does not start; it says why on stderr."""
    command = [sys.executable, "-m", "vlm_local", "serve", "--model", "tiny", "--record", "off", "--port", str(port)]
    process = subprocess.Popen([*command, "-q"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = next(
            (found for line in process.stdout if (found := re.match(r"ready: .* at (http://[^\s,]+)", line))), None
        )
        if ready is None:
            raise ConfigError("the server did not start; it says why above")
        yield ready[1]
    finally:
        end_process(process)


def play(url: str, num_episodes: int | None) -> Iterator[DemoEpisode]:
    """Play one task after another in ever new scenes; num_episodes: None to go on for ever."""
    policy = RemotePolicy(f"{url}/s/simulated-widowx")
    environment = EnvironmentProcess(OURS, "normal", 256)
    try:
        numbers = itertools.count() if num_episodes is None else range(num_episodes)
        for number, task in zip(numbers, itertools.cycle(TASKS), strict=False):
            yield _play_episode(policy, environment, task, number)
            time.sleep(_REST_S)
    finally:
        environment.close()
        policy.close()


def _play_episode(policy: RemotePolicy, environment: EnvironmentProcess, task: str, seed: int) -> DemoEpisode:
    state = environment.reset(task, seed)
    instruction = state.observation.instruction
    policy.reset(seed)
    for step in range(_MAX_STEPS):
        due = time.monotonic() + _STEP_S
        state = environment.step(policy.act(state.observation).action)
        if state.ended:
            return DemoEpisode(instruction, state.ended, step + 1)
        time.sleep(max(due - time.monotonic(), 0.0))
    return DemoEpisode(instruction, "late", _MAX_STEPS)
