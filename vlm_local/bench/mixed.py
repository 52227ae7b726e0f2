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

from vlm_local.bench.act import start_server
from vlm_local.bench.load import summarise
from vlm_local.bench.rough_robot import Diary, RoughRobot
from vlm_local.plain import hide_secrets
from vlm_local.progress import track
from vlm_local.registry import DEFAULT

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


def measure(options, settings: MixedSettings) -> dict[str, Any]:
    """options: PolicyOptions of the model. `passed` of the result is the verdict, `violations` the first reasons."""
    with ExitStack() as stack:
        folders = (Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mixed-"))) for _ in range(2))
        server, other = (stack.enter_context(start_server(options, folder)) for folder in folders)
        played, strangers = _play_rounds(server.url, other.url, settings)
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(60)
    told = {"benchmark": "mixed", "model": hide_secrets(options.model or DEFAULT)}
    return judge(settings, played, strangers, status) | told


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
        "p95_ratio": {phase: value if math.isfinite(value) else None for phase, value in ratio.items()},
        "load_average": os.getloadavg(),
        "strangers": dict(sorted(strangers.items())),
    }


def _count_lost(diary: Diary) -> int:
    """Requests that were not answered by the model: refused, held, or not answered at all."""
    return diary.counts["act"] + diary.counts["reconnect"] - len(diary.latencies_ms)
