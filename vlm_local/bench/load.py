"""A soak: rough robots against a server whose engine fails and whose model's process gets killed.

Every well-formed request must be answered or refused with a reason, no answered step may be missing
from the recording, and the server's memory must not grow.
"""

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vlm_local.bench.act import await_ready, list_processes, run_logged
from vlm_local.bench.rough_robot import Diary, RoughRobot, read_stamp
from vlm_local.bench.sidecar import NAME
from vlm_local.data.runs import read_run
from vlm_local.errors import ConfigError, DataError
from vlm_local.plain import hide_secrets
from vlm_local.progress import open_bar
from vlm_local.registry import DEFAULT

DEADLINE_MS = 4000.0
MAX_GROWTH = 0.05
_SETTLED = 0.2  # memory is compared from here on: by then every cache has filled
_SHORTEST_TO_JUDGE_S = 300.0  # the allocator's own noise is larger in a shorter run
_SAMPLE_EVERY_S = 2.0
_START_S = 300.0
_SHOWN = 20
_PYTHON = (sys.executable, "-m")


@dataclass(frozen=True)
class SoakSettings:
    """hz: requests a second of each robot. fault_rate: share of the engine's calls that fail.

    kill_every_s: mean time to the next kill -9 of the process that holds the model, None for never.
    sidecar: it is an OpenAI-compatible server, which the soak starts again; else it is the policy
    server's own, as with `serve`, which has to start it again itself.
    """

    robots: int = 8
    minutes: float = 30.0
    hz: float = 5.0
    fault_rate: float = 0.005
    kill_every_s: float | None = 60.0
    sidecar: bool = True


def soak(options, settings: SoakSettings) -> dict[str, Any]:
    """options: PolicyOptions of the model. `passed` of the result is the verdict, `violations` the first reasons."""
    options = replace(options, deadline_ms=options.deadline_ms or DEADLINE_MS)
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        _start_sidecar(options, settings, Path(folder)) as sidecar,
    ):
        wanted = {"options": asdict(options if sidecar is None else sidecar.options), "seed": 0}
        wanted |= {"record": str(Path(folder) / "runs"), "fault_rate": settings.fault_rate}
        log = Path(folder) / "server.log"
        with run_logged([*_PYTHON, "vlm_local.bench.faulty_server", json.dumps(wanted)], log) as server:
            url = await_ready(server, log)
            kill = partial(_kill_engine, server.pid) if sidecar is None else sidecar.restart
            diaries, memory, num_kills = _run_robots(settings, url, server.pid, kill)
            metadata = _fetch(f"{url}/metadata")
            recording = _fetch(f"{url}/health")["recording"]
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
        (run_folder,) = (Path(folder) / "runs").iterdir()
        num_recorded, missing = compare_recording(diaries, run_folder)
    return _judge(settings, diaries, memory, missing, status, recording) | {
        "benchmark": "load",
        "model": hide_secrets(options.model or DEFAULT),
        "engine": metadata["engine"],
        "engine_counters": metadata.get("counters"),
        "injected_faults": metadata["injected_faults"],
        "kills": num_kills,
        "steps_recorded": num_recorded,
    }


def _run_robots(
    settings: SoakSettings, url: str, pid: int, kill: Callable[[threading.Event], int]
) -> tuple[dict[str, Diary], list[float], int]:
    """Let all loose for the time asked for -> diaries by robot, the server's memory in MB over time, kills."""
    stop = threading.Event()
    robots = [RoughRobot(url, f"robot-{index}", settings.hz, index, stop) for index in range(settings.robots)]
    killer = _Killer(kill, settings.kill_every_s, stop)
    others = [threading.Thread(target=_look_at_page, args=(url, stop), daemon=True), killer]
    for thread in [*robots, *others]:
        thread.start()
    memory, end = [], time.monotonic() + 60 * settings.minutes
    with open_bar("soak", round(60 * settings.minutes / _SAMPLE_EVERY_S), "sample") as bar:
        while time.monotonic() < end:
            time.sleep(min(_SAMPLE_EVERY_S, max(end - time.monotonic(), 0.01)))
            with suppress(psutil.NoSuchProcess):  # killed in this moment
                memory.append(sum(process.memory_info().rss for process in list_processes(pid)) / 2**20)
            bar.update()
    stop.set()
    for thread in [*robots, *others]:
        thread.join(120)
    return {robot.name: robot.diary for robot in robots}, memory, killer.num_kills


class _Killer(threading.Thread):
    """Kills what holds the model, again and again. kill: returns how many processes it has killed."""

    def __init__(self, kill: Callable[[threading.Event], int], mean_s: float | None, stop: threading.Event):
        super().__init__(daemon=True)
        self._kill = kill
        self._mean_s = mean_s
        self._stop_event = stop
        self.num_kills = 0

    def run(self) -> None:
        random = np.random.default_rng(2)
        while self._mean_s is not None and not self._stop_event.wait(random.uniform(0.5, 1.5) * self._mean_s):
            self.num_kills += self._kill(self._stop_event)


def _kill_engine(pid: int, stop: threading.Event) -> int:
    """kill -9 of the processes that the server has started -> how many; it starts them again itself."""
    engines = psutil.Process(pid).children()
    for engine in engines:
        engine.kill()
    return len(engines)


def _look_at_page(url: str, stop: threading.Event) -> None:
    """Someone opens the live page again and again, and closes it in the middle of its stream."""
    random = np.random.default_rng(1)
    while not stop.wait(random.uniform(0.5, 3)):
        with suppress(OSError), urllib.request.urlopen(f"{url}/live/events", timeout=5) as stream:
            for _ in range(random.integers(1, 200)):
                stream.readline()


def compare_recording(diaries: dict[str, Diary], run: Path) -> tuple[int, list[str]]:
    """Steps recorded, and what the robots were told that is not recorded just so, frame included."""
    problems: list[DataError] = []
    missing = {(name, *key) for name, diary in diaries.items() for key in diary.answered}
    num_recorded, wrong = 0, []
    for episode in read_run(run, problems.append):
        for index, line in enumerate(episode.lines):
            num_recorded += 1
            key = (episode.robot, line["episode"], line["step"])
            if key in missing:
                action, stamp = diaries[episode.robot].answered[key[1:]]
                same = line["action"] == action and read_stamp(episode.load_image(index)) == stamp
                missing.remove(key)
                if not same:
                    wrong.append(f"{key} is recorded with another action or frame")
    return num_recorded, [str(problem) for problem in problems] + wrong + [f"{key} is not recorded" for key in missing]


def _judge(
    settings: SoakSettings,
    diaries: dict[str, Diary],
    memory: list[float],
    missing: list[str],
    status: int,
    recording: dict[str, Any],
) -> dict[str, Any]:
    together = list(diaries.values())
    violations = [what for diary in together for what in diary.violations] + missing
    if status != 0:
        violations.append(f"the server ended with status {status} after SIGTERM")
    if recording["lost"]:
        violations.append(f"the recorder lost {recording['lost']} steps")
    growth = measure_growth(memory)
    is_long = 60 * settings.minutes >= _SHORTEST_TO_JUDGE_S
    if is_long and growth["growth"] > MAX_GROWTH:
        violations.append(f"memory grew by {growth['growth']:.1%}")
    if not any(diary.latencies_ms for diary in together):
        violations.append("no request was answered by the model")
    counts = sum((diary.counts for diary in together), Counter())
    refusals = sum((diary.refusals for diary in together), Counter())
    latencies = [ms for diary in together for ms in diary.latencies_ms]
    return {
        "passed": not violations,
        "violations": violations[:_SHOWN],
        "num_violations": len(violations),
        **asdict(settings),
        "requests": dict(counts),
        "steps_answered": sum(len(diary.answered) for diary in together),
        "stand_stills": counts["held"],
        "refused": refusals.total(),
        "refusals": dict(refusals.most_common(8)),
        "latency_ms": summarise(latencies),
        "memory_mb": growth,
    }


def measure_growth(memory: Sequence[float]) -> dict[str, float]:
    """Medians of the first and last tenth of what came after the start, and their ratio less 1."""
    settled = memory[int(_SETTLED * len(memory)) :] or memory
    tenth = max(1, len(settled) // 10)
    first, last = float(np.median(settled[:tenth])), float(np.median(settled[-tenth:]))
    return {"first": round(first, 1), "last": round(last, 1), "peak": round(max(memory), 1), "growth": last / first - 1}


def summarise(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"n": 0}
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"n": len(values), "p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1)}


class _Sidecar:
    """The model's own process, which is killed and started again on the same port."""

    def __init__(self, options, log: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        self._command = [*_PYTHON, "vlm_local.bench.sidecar", str(self._port), json.dumps(asdict(options))]
        self._log = log
        self._random = np.random.default_rng(3)
        url = f"http://127.0.0.1:{self._port}"
        loading = dict.fromkeys(("quantize", "device", "dtype", "decoder"))  # is the sidecar's own business
        self.options = replace(options, model=NAME, engine="openai", engine_url=url, **loading)
        self.process = self._start()

    def _start(self) -> subprocess.Popen:
        with self._log.open("a") as file:
            return subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=file)

    def wait_ready(self, stop: threading.Event | None = None) -> None:
        """Raises ConfigError where it does not start; gives up in peace once `stop` is set."""
        end = time.monotonic() + _START_S
        while self.process.poll() is None and time.monotonic() < end:
            if stop is not None and stop.is_set():
                return
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return
            time.sleep(0.1)
        raise ConfigError(f"the sidecar did not start: {self._log.read_text()[-2000:]}")

    def restart(self, stop: threading.Event) -> int:
        """kill -9, and back after up to three seconds -> 1, the processes killed."""
        self.process.kill()
        self.process.wait()
        stop.wait(self._random.uniform(0, 3))
        self.process = self._start()
        self.wait_ready(stop)
        return 1


@contextmanager
def _start_sidecar(options, settings: SoakSettings, folder: Path) -> Iterator[_Sidecar | None]:
    if not settings.sidecar:
        yield None
        return
    sidecar = _Sidecar(replace(options, engine="local", engine_url=None), folder / "sidecar.log")
    try:
        sidecar.wait_ready()
        yield sidecar
    finally:
        sidecar.process.kill()
        sidecar.process.wait()


def _fetch(url: str) -> dict[str, Any]:
    try:
        answer = urllib.request.urlopen(url, timeout=60)
    except urllib.error.HTTPError as refusal:  # /health is a 503 with all it knows while the model is away
        answer = refusal
    with answer:
        return json.load(answer)
