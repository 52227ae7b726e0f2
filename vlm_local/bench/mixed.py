"""Robots alone, and beside everybody else: no request of theirs may be lost, and none may come much later.

Both are measured in one run, in turns, against `serve` as a user starts it.
"""

import json
import math
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm_local.bench.load import await_ready, summarise
from vlm_local.bench.rough_robot import Diary, RoughRobot
from vlm_local.provenance import describe_machine

MAX_RATIO = 1.5
_RECONNECT = {"reconnect": 0.5}  # AutoEval keeps its connection, many clients open one for each step
_SETTLE_S = 3.0  # before the first round
_SHOWN = 20


@dataclass(frozen=True)
class MixedSettings:
    """seconds: of mixed traffic, and of robots alone; in as many `rounds` each. hz: requests a second of a robot."""

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
    """The result as a JSON object; `passed` is the choice, `violations` the first reasons against it."""
    with tempfile.TemporaryDirectory(prefix="mixed-") as folder:
        log = Path(folder) / "server.log"
        command = [sys.executable, "-m", "vlm_local", "serve", *_list_flags(options), "--port", "0", "--record"]
        with log.open("w") as file:
            server = subprocess.Popen([*command, folder], stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            url = await_ready(server, log)
            alone, mixed, strangers = _play_rounds(url, settings)
            server.send_signal(signal.SIGTERM)
            status = server.wait(60)
        finally:
            server.kill()
            server.wait()
    return judge(settings, alone, mixed, strangers, status) | {
        "benchmark": "mixed",
        "model": options.model or "tiny",
        **describe_machine(),
    }


def _play_rounds(url: str, settings: MixedSettings) -> tuple[list[Diary], list[Diary], Counter[str]]:
    """Diaries of the robots alone and beside strangers, and what those were answered."""
    _play(url, settings, _SETTLE_S)
    alone, mixed, answers = [], [], Counter()
    seconds = settings.seconds / settings.rounds
    for _ in range(settings.rounds):
        alone += _play(url, settings, seconds)
        command = [sys.executable, "-m", "vlm_local.bench.strangers", url, str(seconds)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as strangers:
            told = strangers.stdout
            assert told is not None  # a pipe
            try:
                told.readline()  # "ready"
                mixed += _play(url, settings, seconds)
                answers.update(json.loads(told.readline()))
            finally:
                strangers.kill()
    return alone, mixed, answers


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
    settings: MixedSettings, alone: list[Diary], mixed: list[Diary], strangers: Counter[str], status: int
) -> dict[str, Any]:
    """strangers: as Strangers.counts. status: with which the server ended."""
    both = {"alone": alone, "mixed": mixed}
    lost = {name: sum(map(_count_lost, diaries)) for name, diaries in both.items()}
    latency = {name: summarise([ms for diary in each for ms in diary.latencies_ms]) for name, each in both.items()}
    ratio = latency["mixed"].get("p95", math.inf) / latency["alone"].get("p95", math.inf)
    violations = [what for diary in (*alone, *mixed) for what in diary.violations]
    violations += [f"{count} requests of robots lost, {name}" for name, count in lost.items() if count]
    violations += [f"strangers got {answer}" for answer in strangers if re.search(": 50[^3]$", answer)]
    if not ratio <= MAX_RATIO:
        violations.append(f"p95 is {ratio:.2f} times that of the robots alone")
    if status != 0:
        violations.append(f"the server ended with status {status} after SIGTERM")
    return {
        "passed": not violations,
        "violations": violations[:_SHOWN],
        **asdict(settings),
        "lost": lost,
        "latency_ms": latency,
        "p95_ratio": round(ratio, 3),
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
