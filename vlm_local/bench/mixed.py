"""Robots alone, and beside everybody else: no request of theirs may be lost, and none may come much later.

Both are measured in one run, in turns, against `serve` as a user starts it. So is what the machine itself adds:
the same robots, while the strangers ask another server.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from vlm_local.bench.load import await_ready, summarise
from vlm_local.bench.rough_robot import Diary, RoughRobot
from vlm_local.progress import track
from vlm_local.provenance import describe_machine

MAX_RATIO = 1.5
PHASES = ("alone", "mixed", "elsewhere")
_RECONNECT = {"reconnect": 0.5}  # AutoEval keeps its connection, many clients open one for each step
_SETTLE_S = 3.0  # before the first round
_SHOWN = 20


@dataclass(frozen=True)
class MixedSettings:
    """seconds: of each of PHASES, in as many `rounds`. hz: requests a second of a robot."""

    robots: int = 6
    seconds: float = 60.0
    rounds: int = 4
    hz: float = 2.0


def run(options, settings: MixedSettings) -> int:
    """options: PolicyOptions of the model. Prints what went wrong, then one JSON object."""
    result = measure(options, settings)
    for what in result["violations"]:
        print(f"violation: {what}")
    print(json.dumps(result))
    return 0 if result["passed"] else 1


def measure(options, settings: MixedSettings) -> dict[str, Any]:
    """The result as a JSON object; `passed` is the verdict, `violations` the first reasons against it."""
    with ExitStack() as stack:
        server, url = stack.enter_context(_serve(options))
        _, other_url = stack.enter_context(_serve(options))
        played, strangers = _play_rounds(url, other_url, settings)
        server.send_signal(signal.SIGTERM)
        status = server.wait(60)
    return judge(settings, played, strangers, status) | {
        "benchmark": "mixed",
        "model": options.model or "tiny",
        **describe_machine(),
    }


@contextmanager
def _serve(options) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server as a user starts it, and its URL."""
    with tempfile.TemporaryDirectory(prefix="mixed-") as folder:
        log = Path(folder) / "server.log"
        command = [sys.executable, "-m", "vlm_local", "serve", *_list_flags(options), "--port", "0", "--record"]
        with log.open("w") as file:
            server = subprocess.Popen([*command, folder], stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            yield server, await_ready(server, log)
        finally:
            server.kill()
            server.wait()


def _play_rounds(url: str, other_url: str, settings: MixedSettings) -> tuple[dict[str, list[Diary]], Counter[str]]:
    """Diaries of the robots under each of PHASES, and what their own server answered the strangers."""
    _play(url, settings, _SETTLE_S)
    played, answers = {phase: [] for phase in PHASES}, Counter()
    seconds = settings.seconds / settings.rounds
    for _ in track(range(settings.rounds), "alone, mixed, elsewhere", "round"):
        played["alone"] += _play(url, settings, seconds)
        with _strangers(url, seconds) as told:
            played["mixed"] += _play(url, settings, seconds)
            answers.update(json.loads(told.readline()))
        with _strangers(other_url, seconds) as told:
            played["elsewhere"] += _play(url, settings, seconds)
            told.readline()  # until their last answer
    return played, answers


@contextmanager
def _strangers(url: str, seconds: float) -> Iterator[IO[str]]:
    """What strangers print, who have begun to ask; in the end they print what they were answered."""
    command = [sys.executable, "-m", "vlm_local.bench.strangers", url, str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as strangers:
        told = strangers.stdout
        assert told is not None  # a pipe
        try:
            told.readline()  # "ready"
            yield told
        finally:
            strangers.kill()


def _play(url: str, settings: MixedSettings, seconds: float) -> list[Diary]:
    stop = threading.Event()
    robots = [
        RoughRobot(url, f"robot-{index}", settings.hz, index, stop, _RECONNECT) for index in range(settings.robots)
    ]
    for robot in robots:
        time.sleep(1 / settings.hz / settings.robots)  # robots do not ask at the same moment
        robot.start()
    time.sleep(seconds)
    stop.set()
    for robot in robots:
        robot.join()
    return [robot.diary for robot in robots]


def judge(
    settings: MixedSettings, played: Mapping[str, list[Diary]], strangers: Counter[str], status: int
) -> dict[str, Any]:
    """played: for each of PHASES. strangers: as Strangers.counts. status: with which the server ended."""
    lost = {phase: sum(map(_count_lost, diaries)) for phase, diaries in played.items()}
    latency = {
        phase: summarise([ms for diary in diaries for ms in diary.latencies_ms]) for phase, diaries in played.items()
    }
    p95 = {phase: each.get("p95", math.inf) for phase, each in latency.items()}
    ratio = {phase: round(p95[phase] / p95["alone"], 3) for phase in PHASES[1:]}
    violations = [what for diaries in played.values() for diary in diaries for what in diary.violations]
    violations += [f"{count} requests of robots lost, {phase}" for phase, count in lost.items() if count]
    violations += [f"strangers got {answer}" for answer in strangers if re.search(": 50[^3]$", answer)]
    if not ratio["mixed"] <= MAX_RATIO:
        violations.append(
            f"p95 is {ratio['mixed']:.2f} times that of the robots alone; "
            f"{ratio['elsewhere']:.2f} times where the strangers ask another server of this machine"
        )
    if status != 0:
        violations.append(f"the server ended with status {status} after SIGTERM")
    return {
        "passed": not violations,
        "violations": violations[:_SHOWN],
        **asdict(settings),
        "lost": lost,
        "latency_ms": latency,
        "p95_ratio": ratio,
        "load_average": os.getloadavg(),
        "strangers": dict(sorted(strangers.items())),
    }


def _count_lost(diary: Diary) -> int:
    """Requests that were not answered by the model: refused, held, or not answered at all."""
    return diary.counts["act"] + diary.counts["reconnect"] - len(diary.latencies_ms)


def _list_flags(options) -> list[str]:
    """PolicyOptions as `serve` is given them."""
    flags = []
    for name, value in asdict(options).items():
        if value not in (None, False):
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return flags
