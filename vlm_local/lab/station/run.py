"""A whole job of an AutoEval station against any policy server, in our simulator.

In the order of AutoEval's own: the submission test; then of each episode a reset of the arm, POST /reset, and so many
steps of an answer and its execution, whatever has been reached. What would have ended the job is noted, and the job
goes on, so that one run shows all of it.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from vlm_local.errors import ConfigError
from vlm_local.files import encode_json, write_json
from vlm_local.lab.station.arm import StationArm
from vlm_local.lab.station.client import JobEnded, StationClient, submit_test
from vlm_local.lab.station.files import write_metadata, write_trajectory
from vlm_local.lab.station.link import Link
from vlm_local.lab.statistics import describe_rate
from vlm_local.provenance import describe_machine
from vlm_local.sim.environment import SimEnv

IMAGE_SIZE = 256
_RESET_S = 4.1  # of a station's arm, on a wall clock


@dataclass(frozen=True)
class JobPlan:
    """url: of the policy server. clock: "step", where the world waits for answers, or "wall", where it does not.

    test_every: a submission test comes from elsewhere in the middle of every so many episodes, 0 for never.
    drop_s: once in mid-job the way to the server is silent for so long, None for never.
    """

    url: str
    task: str
    episodes: int = 10
    max_steps: int = 70
    clock: str = "step"
    test_every: int = 1
    drop_s: float | None = None
    seed: int = 0


@dataclass
class _Tally:
    """Of the whole job. reached: episodes that succeeded at some step; successes: at the end."""

    ms: list[float] = field(default_factory=list)
    clipped: int = 0
    dropped: int = 0
    successes: int = 0
    reached: int = 0
    would_have_ended: list[dict[str, Any]] = field(default_factory=list)


def run_job(plan: JobPlan, out: Path, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Play the job into `out` and return its report. Raises ConfigError where the submission test fails."""
    if plan.clock not in ("step", "wall"):
        raise ConfigError(f"clock must be step or wall, not {plan.clock!r}")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} holds something already; name another --out")
    try:
        submit_test(plan.url)
    except JobEnded as error:
        raise ConfigError(f"the submission test fails, so the form would not take this address: {error}") from None
    parts = urlsplit(plan.url)
    link = None if plan.drop_s is None else Link((parts.hostname or "", parts.port or 80))
    url = plan.url if link is None else link.url + parts.path
    env, client = SimEnv(plan.task, image_size=IMAGE_SIZE), StationClient(url)
    try:
        with closing(_Job(plan, env, client, link, out)) as job:
            for number in range(plan.episodes):
                job.play(number)
                progress(number + 1)
            report = job.build_report()
    finally:
        client.close()
        env.close()
        if link is not None:
            link.close()
    write_json(out / "report.json", report)
    return report


class _Job:
    def __init__(self, plan: JobPlan, env: SimEnv, client: StationClient, link: Link | None, out: Path):
        self._plan, self._env, self._client, self._link = plan, env, client, link
        self._arm = StationArm(env)
        self._instruction = env.task.words[0]  # AutoEval's own, the same in the whole job
        self._random = np.random.default_rng(plan.seed)
        self._tally = _Tally()
        self._eval_id = str(int(self._random.integers(10**15)))
        self._folder = out / "eval_data" / self._eval_id
        self._folder.mkdir(parents=True)
        write_metadata(self._folder, self._eval_id)
        self._lines = (out / "station.jsonl").open("w", encoding="utf-8")

    def close(self) -> None:
        self._lines.close()

    def play(self, number: int) -> None:
        plan, began = self._plan, time.monotonic()
        self._env.reset(seed=plan.seed + number)
        self._arm.reset()
        image = self._env.judge()[0]["image"]
        if plan.clock == "wall":
            time.sleep(_RESET_S)
        self._survive("/reset", number, -1, self._client.reset)
        test_at, drop_at = self._random.integers(plan.max_steps, size=2)
        steps, info, is_reached = [], {}, False
        for step in range(plan.max_steps):
            if plan.test_every and number % plan.test_every == 0 and step == test_at:
                self._survive("submission test", number, step, lambda: submit_test(plan.url))
            if self._link is not None and number == plan.episodes // 2 and step == drop_at:
                self._link.fall_silent(plan.drop_s or 0.0)
            image, info = self._take_step(number, step, image, steps)
            is_reached |= info["success"]
        self._tally.successes += info["success"]
        self._tally.reached += is_reached
        seconds = time.monotonic() - began
        write_trajectory(self._folder / f"traj_{number}.pkl", self._instruction, steps, info["success"], seconds)

    def _take_step(self, number: int, step: int, image: np.ndarray, steps: list) -> tuple[np.ndarray, Mapping]:
        """Ask, carry out, observe; appends to `steps` and returns the picture and the simulator's info."""
        state, began = self._arm.state, time.perf_counter()
        answer = self._survive("/act", number, step, lambda: self._client.act(image, self._instruction, state))
        seconds = time.perf_counter() - began
        self._tally.ms.append(1e3 * seconds)
        if self._plan.clock == "wall":
            self._env.world.wait(seconds)
        action = np.array([0.0] * 6 + [1.0]) if answer is None else answer
        executed = self._arm.act(action)
        observation, *_, info = self._env.judge()
        self._tally.clipped += executed.clipped
        self._tally.dropped += executed.dropped
        line = {"episode": number, "step": step, "sent": state, "action": action, "executed": executed.executed}
        line |= {"commanded": executed.commanded, "clipped": executed.clipped, "dropped": executed.dropped}
        self._lines.write(encode_json(line | {"ms": round(1e3 * seconds, 3), "success": info["success"]}) + "\n")
        steps.append({"action": action, "image": observation["image"], "state": self._arm.state})
        return observation["image"], info

    def _survive(self, request: str, episode: int, step: int, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, None where AutoEval would have ended the job."""
        try:
            return ask()
        except JobEnded as error:
            event = {"request": request, "episode": episode, "step": step, "time": time.time()}
            self._tally.would_have_ended.append({**event, "exception": str(error)})
            return None

    def build_report(self) -> dict[str, Any]:
        tally, plan = self._tally, self._plan
        ms = np.array(tally.ms)
        return {
            "station": {**vars(plan), "eval_id": self._eval_id},
            "success": describe_rate(tally.successes, plan.episodes),
            "reached": describe_rate(tally.reached, plan.episodes),
            "answer_ms": {"p50": np.quantile(ms, 0.5), "p95": np.quantile(ms, 0.95), "max": ms.max(), "n": len(ms)},
            "clipped": tally.clipped,
            "dropped": tally.dropped,
            "would_have_ended": tally.would_have_ended,
            **describe_machine(),
        }


def format_report(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    success, reached, ms = report["success"], report["reached"], report["answer_ms"]
    low, high = (100 * edge for edge in success["interval"])
    lines = [
        f"success at the end {success['count']} of {success['n']} ({low:.0f} to {high:.0f} %), at some step "
        f"{reached['count']}",
        f"answers: median {ms['p50']:.0f} ms, 95 % within {ms['p95']:.0f}, longest {ms['max']:.0f}",
        f"steps: {ms['n']}, clipped {report['clipped']}, out of reach {report['dropped']}",
    ]
    ended = report["would_have_ended"]
    lines += [f"AutoEval would have ended the job {len(ended)} times" if ended else "nothing would have ended the job"]
    lines += [f"  episode {each['episode']}, step {each['step']}, {each['exception']}" for each in ended]
    return "\n".join(lines)
