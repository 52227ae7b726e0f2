"""A whole job of an AutoEval station against any policy server, in our simulator.

In the order of AutoEval's own: the submission test; then of each episode the scene is put back, the arm is reset,
POST /reset, and so many steps of an answer and its execution, whatever has been reached; last the detector. What would
have ended the job is noted, and the job goes on, so that one run shows all of it.
"""

import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.data.film import write_film
from vlm_local.errors import ConfigError
from vlm_local.files import encode_json, list_missing, remove_unused, write_json
from vlm_local.lab.station.arm import StationArm
from vlm_local.lab.station.camera import StationCamera
from vlm_local.lab.station.client import JobEnded, StationClient, submit_test
from vlm_local.lab.station.files import write_metadata, write_trajectory
from vlm_local.lab.station.report import write_job_page
from vlm_local.lab.station.scene import Judge, SceneReset
from vlm_local.lab.station.way import ServerGone, Way
from vlm_local.lab.statistics import describe_rate
from vlm_local.plain import hide_secrets
from vlm_local.provenance import describe_machine
from vlm_local.sim.environment import SimEnv

_RESET_S = 4.1  # of a station's arm, on a wall clock
_MAX_FILMS = 10
_NOTES = ("clipped", "reversed", "dropped")  # what may become of a step, fields of arm.Executed


@dataclass(frozen=True)
class JobPlan:
    """url: of the policy server. clock: "step", where the world waits for answers, or "wall", where it does not.

    test_every: a submission test comes from elsewhere in the middle of every so many episodes, 0 for never.
    drop_s: the tunnel is silent for so long once in mid-job, and gone once, with two episodes or more; None for never.
    has_relay: whether requests go through the relay, which stands on this side of the tunnel.
    restart_at: (episode, step, shell command) that ends the server and starts it again.
    reset_policy, detector: as SceneReset and Judge take them. human_eval: as AutoEval's flag, no box.
    """

    url: str
    task: str
    episodes: int = 10
    max_steps: int = 70
    clock: str = "step"
    test_every: int = 1
    drop_s: float | None = None
    has_relay: bool = False
    restart_at: tuple[int, int, str] | None = None
    reset_policy: str = "scripted"
    detector: str = "truth"
    human_eval: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.restart_at is None:
            return
        episode, step, _ = self.restart_at
        if episode >= self.episodes or step >= self.max_steps:
            raise ConfigError(
                f"--restart-at {episode}:{step} is never reached in {self.episodes} episodes of {self.max_steps} "
                "steps, both counted from 0"
            )

    def hide_secrets(self) -> "JobPlan":
        """Without tokens in its addresses and its command, as a report may say it."""
        restart_at = self.restart_at and (*self.restart_at[:2], hide_secrets(self.restart_at[2]))
        addresses = {name: hide_secrets(getattr(self, name)) for name in ("url", "reset_policy", "detector")}
        return replace(self, restart_at=restart_at, **addresses)


@dataclass
class _Tally:
    """Of the whole job. counts: of episodes with "success" at the end by the detector, and in "truth", of those that
    "reached" it at some step; and of steps, by _NOTES.
    """

    ms: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    would_have_ended: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[dict[str, Any]] = field(default_factory=list)


def run_job(plan: JobPlan, out: Path, progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Play the job into `out` and return its report.

    It ends early where the server is gone for good; the report is then of the episodes before, and says so. Raises
    ConfigError where the submission test fails, or no episode was played whole.
    """
    made = list_missing(out)
    require_free(out, "second")
    try:
        submit_test(plan.url)
    except JobEnded as error:
        remove_unused(made)
        raise ConfigError(f"the submission test fails, so the form would not take this address: {error}") from None
    except ConfigError:
        remove_unused(made)
        raise
    with ExitStack() as stack:
        way = stack.enter_context(closing(Way(plan.url, plan.drop_s is not None, plan.has_relay)))
        env = stack.enter_context(closing(SimEnv(plan.task, image_size=None)))
        camera = stack.enter_context(closing(StationCamera(env.world)))
        job = stack.enter_context(closing(_Job(plan, env, camera, way, out)))
        gone = None
        for number in range(plan.episodes):
            try:
                job.play(number)
            except ServerGone as error:
                gone = str(error)
                break
            progress(number + 1)
        if not job.tally.episodes:
            raise ConfigError(
                f"the job ended in its first episode: {job.tally.would_have_ended[0]['exception']}; {gone}"
            )
        report, episodes = job.build_report(gone), job.tally.episodes
    write_json(out / "report.json", report)
    write_job_page(out, report, episodes)
    return report


def require_free(out: Path, *but: str) -> None:
    """Raises ConfigError unless `out` can be made, or is a folder that holds nothing but these names."""
    try:
        is_free = not out.exists() or all(path.name in but for path in out.iterdir())
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {out}: {error.strerror}; name another --out") from None
    if not is_free:
        raise ConfigError(f"{out} holds something already; name another --out")


class _Job:
    def __init__(self, plan: JobPlan, env: SimEnv, camera: StationCamera, way: Way, out: Path):
        self._plan, self._env, self._camera, self._way, self._out = plan, env, camera, way, out
        self._client = StationClient(way.url)
        self._arm = StationArm(env, has_box=not plan.human_eval)
        self._instruction = env.task.words[0]  # AutoEval's own, the same in the whole job
        self._random = np.random.default_rng(plan.seed)
        self.tally = _Tally()
        self._eval_id = str(int(self._random.integers(10**15)))
        self._folder = out / "eval_data" / self._eval_id
        log = f"station_open_web_client_{self._instruction.replace(' ', '_')}_{self._eval_id}"  # as AutoEval names it
        self._judge = Judge(plan.detector, env, camera, out / "auto_eval_log" / log)
        self._scene = SceneReset(plan.reset_policy, env, camera, self._arm, self._judge)
        self._folder.mkdir(parents=True)
        (out / "films").mkdir()
        write_metadata(self._folder, self._eval_id)
        self._lines = (out / "station.jsonl").open("w", encoding="utf-8")

    def close(self) -> None:
        self._lines.close()
        self._scene.close()
        self._client.close()

    def play(self, number: int) -> None:
        plan, tally = self._plan, self.tally
        seed = plan.seed + number
        self._scene.put_back(seed, number == 0, lambda ask: self._survive("scene reset", number, -1, ask))
        began = time.monotonic()
        self._arm.reset()
        image = self._camera.take()
        if plan.clock == "wall":
            time.sleep(_RESET_S)
        self._survive("/reset", number, -1, self._client.reset)
        test_at, drop_at = self._random.integers(plan.max_steps, size=2)
        steps, is_reached = [], False
        for step in range(plan.max_steps):
            if plan.test_every and number % plan.test_every == 0 and step == test_at:
                self._survive("submission test", number, step, lambda: submit_test(plan.url))
            if step == drop_at:
                self._drop(number)
            if plan.restart_at is not None and plan.restart_at[:2] == (number, step):
                subprocess.Popen(plan.restart_at[2], shell=True, start_new_session=True)
            image, info = self._take_step(number, step, image, steps)
            is_reached |= info["success"]
        seconds = time.monotonic() - began
        verdict = self._survive("detector", number, plan.max_steps, lambda: self._judge.judge_rollout(self._env.task))
        success, truth = verdict or (False, bool(self._env.task.is_done(self._env.world)))
        tally.counts.update(success=int(success), truth=int(truth), reached=int(is_reached))
        tally.seconds += seconds
        write_trajectory(self._folder / f"traj_{number}.pkl", self._instruction, steps, success, seconds)
        film = self._film(number, steps) if number < _MAX_FILMS else None
        ended = {"number": number, "success": success, "truth": truth, "seconds": seconds}
        tally.episodes.append({**ended, "film": film, "last": image})

    def _drop(self, number: int) -> None:
        """The tunnel is silent in the episode after a third of them, and gone in the one after two thirds."""
        plan, tunnel = self._plan, self._way.tunnel
        if tunnel is None or plan.drop_s is None:
            return
        if number == plan.episodes // 3:
            tunnel.fall_silent(plan.drop_s)
        elif number == 2 * plan.episodes // 3:
            tunnel.break_down(plan.drop_s)

    def _take_step(self, number: int, step: int, image: np.ndarray, steps: list) -> tuple[np.ndarray, Mapping]:
        """Ask, carry out, observe; appends to `steps` and returns the picture and the simulator's info."""
        state, began = self._arm.state, time.perf_counter()
        answer = self._survive("/act", number, step, lambda: self._client.act(image, self._instruction, state))
        seconds = time.perf_counter() - began
        self.tally.ms.append(1e3 * seconds)
        if self._plan.clock == "wall":
            self._env.world.wait(seconds)
        action = np.array([0.0] * 6 + [1.0]) if answer is None else answer
        executed = self._arm.act(action)
        info, seen = self._env.judge()[-1], self._camera.take()
        notes = {name: getattr(executed, name) for name in _NOTES}
        self.tally.counts.update({name: int(value) for name, value in notes.items()})
        line = {"episode": number, "step": step, "sent": state, "action": action, "executed": executed.executed}
        line |= {"commanded": executed.commanded, **notes, "ms": round(1e3 * seconds, 3), "success": info["success"]}
        self._lines.write(encode_json(line) + "\n")
        after = {"action": action, "image": seen, "state": self._arm.state}
        steps.append({**after, "asked": image, "notes": [name for name, value in notes.items() if value]})
        return seen, info

    def _film(self, number: int, steps: list[dict[str, Any]]) -> str:
        """Its path below the job's folder. Each frame is what the policy saw, with what it answered."""
        path = f"films/episode-{number}.mp4"
        shown = []
        for at, step in enumerate(steps):
            said = {"phrase": ", ".join(step["notes"]), "action": step["action"].tolist()}
            shown.append((step["asked"], {"step": at, "instruction": self._instruction, **said}))
        write_film(self._out / path, shown)
        return path

    def _survive(self, request: str, episode: int, step: int, ask: Callable[[], Any]) -> Any:
        """What `ask` returns, None where AutoEval would have ended the job; it goes on once the server is there."""
        try:
            return ask()
        except JobEnded as error:
            event = {"request": request, "episode": episode, "step": step, "time": time.time()}
            self.tally.would_have_ended.append({**event, "exception": str(error)})
            self._way.wait_back()
            return None

    def build_report(self, gone: str | None) -> dict[str, Any]:
        """gone: why the job ended before its last episode; None where it did not."""
        tally, plan, num_episodes = self.tally, self._plan, len(self.tally.episodes)
        ms = np.array(tally.ms)
        return {
            "station": {**vars(plan.hide_secrets()), "eval_id": self._eval_id},
            "workspace_m": None if self._arm.box is None else self._arm.box.T.round(4),
            "gone": gone,
            **{name: describe_rate(tally.counts[name], num_episodes) for name in ("success", "truth", "reached")},
            "confusion": self._judge.confusion,
            "answer_ms": {"p50": np.quantile(ms, 0.5), "p95": np.quantile(ms, 0.95), "max": ms.max(), "n": len(ms)},
            "steps_per_min": 60 * len(ms) / tally.seconds,
            **{name: tally.counts[name] for name in _NOTES},
            "scene_resets": {"tries": self._scene.tries, "persons_called": self._scene.persons_called},
            "would_have_ended": tally.would_have_ended,
            **describe_machine(),
        }
