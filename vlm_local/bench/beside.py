"""Two ways in one measurement: two servers asked in turns by the same robot, or two doors of one server."""

import itertools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import msgpack
from websockets.sync.client import connect

from vlm_local.bench import Measured
from vlm_local.bench.act import Client, RobotStep, format_times, load_steps, start_server, summarise
from vlm_local.errors import EngineError
from vlm_local.files import read_json_lines
from vlm_local.progress import track
from vlm_local.registry import DEFAULT
from vlm_local.server.frames import pack
from vlm_local.wire import decode_act

_WARM_UP = 10


def compare_servers(options, beside: str, num_requests: int) -> Measured:
    """options: PolicyOptions of the one server. beside: the local model of the other, all else alike."""
    local = replace(options, model=beside, engine="local", engine_url=None)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("one", "other")]
        for each in folders:
            each.mkdir()
        with start_server(options, folders[0]) as one, start_server(local, folders[1]) as other:
            _, steps = load_steps(None)
            times = _time_in_turns([Client(server.url, "robot", steps).act for server in (one, other)], num_requests)
    names = (f"{options.engine} {options.model or DEFAULT}", f"local {beside}")
    summaries, lines = {}, []
    for name, asked in zip(names, times, strict=True):
        round_trips, stages = zip(*asked, strict=True)
        engine_ms = [each["engine"] for each in stages]
        summaries[name] = {"round_trip_ms": summarise(round_trips), "engine_ms": summarise(engine_ms)}
        lines += [f"{name:32} {stage:14} {format_times(summary)}" for stage, summary in summaries[name].items()]
    ratio = round(statistics.median(a / b for (a, _), (b, _) in zip(*times, strict=True)), 3)
    lines.append(f"median ratio of round trips, first to second: {ratio}")
    told = {"benchmark": "act", "beside": summaries, "round_trip_ratio": ratio, "request": "json_numpy, 256x256"}
    return lines, told


def compare_doors(options, num_requests: int) -> Measured:
    """options: PolicyOptions of a server whose HTTP and websocket doors get the same steps, in turns.

    Both doors are measured alike: by what the server recorded of each step, and from outside.
    """
    with tempfile.TemporaryDirectory() as folder:
        with start_server(options, Path(folder), ("--websocket-port", "0")) as server:
            _, steps = load_steps(None)
            assert server.websocket_url is not None  # it was asked for
            with connect(f"{server.websocket_url}s/websocket", compression=None, max_size=None) as websocket:
                websocket.recv()  # what the server says of itself
                frames = itertools.cycle(map(_pack_step, steps))
                doors = {
                    "http": Client(server.url, "http", steps).act,
                    "websocket": lambda: _ask(websocket, next(frames)),
                }
                round_trips = _time_in_turns(list(doors.values()), num_requests)
        # The server has ended, so that all of it is written.
        stages = {name: _read_stages(Path(folder), name)[_WARM_UP:] for name in doors}
    lines: list[str] = []
    result: dict = {"benchmark": "act-doors", "model": server.model, "request": "256x256; json_numpy, msgpack"}
    for stage in ("server_overhead_ms", "round_trip_overhead_ms"):
        result[stage] = {}
        for name, asked in zip(doors, round_trips, strict=True):
            outside = [ms for ms, _ in asked]
            whole = outside if stage == "round_trip_overhead_ms" else [each["total"] for each in stages[name]]
            beyond = [ms - each["engine"] for ms, each in zip(whole, stages[name], strict=True)]
            summary = result[stage][name] = summarise(beyond)
            lines.append(f"{name:10} {stage:24} {format_times(summary)}")
    return lines, result


def _pack_step(step: RobotStep) -> bytes:
    """The body of /act -> the frame in which OpenPI's client sends the same."""
    message = decode_act(step.body)
    fields = {"observation/image": message.image, "prompt": message.instruction, "observation/state": message.state}
    return pack(fields, "openpi")


def _ask(websocket, frame: bytes) -> None:
    websocket.send(frame)
    answer = websocket.recv()
    if not isinstance(answer, bytes) or "actions" not in msgpack.unpackb(answer):
        raise EngineError(f"a request of the benchmark got {answer[:200]!r}")


def _time_in_turns(ask: Sequence[Callable[[], Any]], num_requests: int) -> list[list[tuple[float, Any]]]:
    """(round trip in milliseconds, answer) of each request to each, after a warm-up."""
    times: list[list[tuple[float, Any]]] = [[] for _ in ask]
    for index in track(range(_WARM_UP + num_requests), "both", "request"):
        for each, told in zip(ask, times, strict=True):
            start = perf_counter()
            answer = each()
            if index >= _WARM_UP:
                told.append((1e3 * (perf_counter() - start), answer))
    return times


def _read_stages(folder: Path, robot: str) -> list[dict[str, float]]:
    """`timings_ms` of every step that the server recorded of a robot."""
    lines = [line for path in sorted(folder.glob("*/episodes/*/steps.jsonl")) for line in read_json_lines(path)]
    return [line["timings_ms"] for line in lines if line["robot"] == robot]
