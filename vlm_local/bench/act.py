"""What the server adds to the engine, and how many robots it answers: a real server, real sockets."""

import http.client
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from urllib.parse import urlsplit

import numpy as np
import psutil

from vlm_local.bench import Measured
from vlm_local.bench.sequences import load_sequences
from vlm_local.errors import ConfigError, EngineError
from vlm_local.processes import end_process
from vlm_local.progress import track
from vlm_local.wire import encode_array

_WARM_UP = 10


def measure(
    options, sequences: Path | None, num_requests: int, counts: Sequence[int], seconds: float, rounds: int
) -> Measured:
    """options: PolicyOptions of the server that is started. sequences: what the robots send, None for noise.

    counts: robots at once.
    """
    source, steps = load_steps(sequences)
    with tempfile.TemporaryDirectory() as folder, start_server(options, Path(folder)) as server:
        times = measure_alone(Client(server.url, "alone", steps), num_requests)
        rates, cpu_ms = measure_together(server, steps, counts, seconds, rounds)
        peak_memory_mb = server.read_peak_memory_mb()
    summaries = {name: summarise(values) for name, values in times.items()}
    together = {
        "requests_per_s": {str(count): round(statistics.median(values), 2) for count, values in rates.items()},
        # Of the same round, each: a machine that is busy for a while is busy for both.
        "times_the_first": {
            str(count): round(statistics.median(np.divide(values, rates[counts[0]])), 3)
            for count, values in rates.items()
        },
        "server_cpu_ms_per_request": {str(count): value for count, value in cpu_ms.items()},
    }
    lines = [f"{name:24} {format_times(summary)}" for name, summary in summaries.items()]
    for count in map(str, counts):
        rate, ratio, cost = (values[count] for values in together.values())
        lines.append(f"{count:>3} robots at once {rate:9.2f} requests/s   x{ratio:.2f}   {cost:.1f} ms of CPU each")
    return lines, {
        "benchmark": "act",
        "model": server.model,
        "request": "json_numpy",
        "sequences": source,
        **summaries,
        **together,
        "seconds": seconds,
        "rounds": rounds,
        "start_up_s": round(server.start_up_s, 2),
        "peak_memory_mb": peak_memory_mb,
    }


@dataclass(frozen=True)
class BenchServer:
    url: str
    model: str
    process: subprocess.Popen
    start_up_s: float
    websocket_url: str | None = None

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_peak_memory_mb(self) -> float | None:
        """Largest resident sizes so far, of server and engine together; None where the system does not tell."""
        try:
            texts = [Path(f"/proc/{process.pid}/status").read_text() for process in list_processes(self.pid)]
        except OSError:
            return None
        lines = [line for text in texts for line in text.splitlines() if line.startswith("VmHWM")]
        return round(sum(int(line.split()[1]) for line in lines) / 1024, 1)

    def read_cpu_s(self) -> float:
        """What server and engine have used of the cores so far."""
        used = [process.cpu_times() for process in list_processes(self.pid)]
        return sum(times.user + times.system for times in used)


def list_processes(pid: int) -> list[psutil.Process]:
    """The server and those it has started: its engine."""
    server = psutil.Process(pid)
    return [server, *server.children(recursive=True)]


@dataclass(frozen=True)
class RobotStep:
    """What a robot sends. body: of /act. begins: it resets first."""

    body: bytes
    begins: bool


def load_steps(sequences: Path | None) -> tuple[str, list[RobotStep]]:
    """What robots send, written as AutoEval does, and where it comes from: a run or data set with pictures.

    sequences: None for noise, 256x256. Raises ConfigError where there is nothing to send.
    """
    if sequences is None:
        images = np.random.default_rng(0).integers(0, 256, (4, 256, 256, 3), np.uint8)
        proprio = np.array([0.3, 0.0, 0.15, 0.0, 0.0, 0.0, 0.0, 0.39])  # with a zero before the gripper
        return "noise, 256x256", [_write_step(image, "lift the cup", proprio, begins=False) for image in images]
    source, episodes = load_sequences(sequences)
    steps = []
    for episode in episodes:
        if episode.load_image is None or episode.proprios is None:
            raise ConfigError(f"--sequences {sequences}: bench act needs the pictures and states of every step")
        for step in range(len(episode.phrases)):
            image, proprio = episode.load_image(step), episode.proprios[step]
            steps.append(_write_step(image, episode.instruction, proprio, begins=step == 0))
    return source, steps


def _write_step(image: np.ndarray, instruction: str, proprio: np.ndarray | None, begins: bool) -> RobotStep:
    body = {"image": encode_array(image), "instruction": instruction}
    if proprio is not None:
        body["proprio"] = encode_array(proprio)
    return RobotStep(json.dumps(body).encode(), begins)


@contextmanager
def start_server(options, folder: Path, flags: Sequence[str] = ()) -> Iterator[BenchServer]:
    """`serve` in a process of its own, recording into `folder`, until the block ends."""
    command = [sys.executable, "-m", "vlm_local", "serve", "--port", "0", "--record", str(folder), *flags]
    command += _list_flags(options)
    start = perf_counter()
    with run_logged(command, folder / "server.log") as process:
        model, _, where = await_ready(process, folder / "server.log").partition(" at ")
        start_up_s = perf_counter() - start
        door = next(process.stdout or iter(())) if "--websocket-port" in flags else None
        yield BenchServer(where.split(",")[0].strip(), model, process, start_up_s, door and door.split()[1])


@contextmanager
def run_logged(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen]:
    """A process that ends with the block. stdout is a pipe; stderr is added to `log`."""
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        yield process
    finally:
        end_process(process)


def await_ready(server: subprocess.Popen, log: Path) -> str:
    """What a server says on stdout behind "ready: ". Raises ConfigError where it ends before."""
    line = next((line for line in server.stdout or () if line.startswith("ready: ")), None)
    if line is None:
        raise ConfigError(f"the server did not start: {log.read_text().strip()[-2000:]}")
    return line.removeprefix("ready: ").strip()


def _list_flags(options) -> list[str]:
    """PolicyOptions -> the flags that say them."""
    flags = []
    for name, value in asdict(options).items():
        if value is True:
            flags.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def measure_alone(client: "Client", num_requests: int) -> dict[str, list[float]]:
    """One client alone: milliseconds in /act and of the round trip beyond the engine's, and the engine's."""
    times: dict[str, list[float]] = {"server_overhead_ms": [], "round_trip_overhead_ms": [], "engine_ms": []}
    for index in track(range(_WARM_UP + num_requests), "one robot", "request"):
        start = perf_counter()
        stages = client.act()
        round_trip = 1e3 * (perf_counter() - start)
        if index >= _WARM_UP:
            times["server_overhead_ms"].append(stages["total"] - stages["engine"])
            times["round_trip_overhead_ms"].append(round_trip - stages["engine"])
            times["engine_ms"].append(stages["engine"])
    return times


def measure_together(
    server: BenchServer, steps: Sequence[RobotStep], counts: Sequence[int], seconds: float, rounds: int
) -> tuple[dict[int, list[float]], dict[int, float]]:
    """Answers a second of each round with so many robots at once; rounds are interleaved. And what the
    server used of the cores for an answer, in milliseconds, all rounds together.
    """
    # Each is somewhere else, as robots are, and in the end all have sent the same.
    places = np.linspace(0, len(steps), max(counts), endpoint=False).astype(int)
    clients = [
        Client(server.url, f"robot-{index}", [*steps[place:], *steps[:place]]) for index, place in enumerate(places)
    ]
    for client in clients:
        client.act()
    rates: dict[int, list[float]] = {count: [] for count in counts}
    answers, cpu_s = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0.0)
    for _ in track(range(rounds), "robots at once", "round"):
        for count in counts:
            before = server.read_cpu_s()
            number, taken_s = _drive(clients[:count], seconds)
            cpu_s[count] += server.read_cpu_s() - before
            answers[count] += number
            rates[count].append(number / taken_s)
    return rates, {count: round(1e3 * cpu_s[count] / answers[count], 2) for count in counts}


def _drive(clients: Sequence["Client"], seconds: float) -> tuple[int, float]:
    """How many answers, in how many seconds."""
    end = perf_counter() + seconds
    numbers = [0] * len(clients)

    def drive(index: int) -> None:
        while perf_counter() < end:
            clients[index].act()
            numbers[index] += 1

    threads = [threading.Thread(target=drive, args=(index,)) for index in range(len(clients))]
    start = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(numbers), perf_counter() - start


class Client:
    """A robot that sends steps, written beforehand, over and over."""

    def __init__(self, url: str, robot: str, steps: Sequence[RobotStep]):
        parts = urlsplit(url)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        self._path = f"{parts.path}/s/{robot}"
        self._steps = itertools.cycle(steps)

    def act(self) -> dict[str, float]:
        """One step -> the server's own stages in milliseconds."""
        step = next(self._steps)
        if step.begins:
            self._post("reset", b"{}")
        headers = self._post("act", step.body)
        stages = (stage.split(";dur=") for stage in headers["Server-Timing"].split(", "))
        return {name: float(ms) for name, ms in stages}

    def _post(self, route: str, body: bytes) -> http.client.HTTPMessage:
        self._connection.request("POST", f"{self._path}/{route}", body, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        told = response.read()
        if response.status != 200:
            raise EngineError(f"a request of the benchmark got {response.status}: {told[:200]!r}")
        return response.headers


def summarise(values: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": round(float(p50), 3), "p95": round(float(p95), 3), "n": len(values)}


def format_times(summary: Mapping[str, float]) -> str:
    """`summarise` of milliseconds, for a line of a table."""
    return f"p50 {summary['p50']:8.2f}   p95 {summary['p95']:8.2f}   n {summary['n']}"
