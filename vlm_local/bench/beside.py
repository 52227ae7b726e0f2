"""Two ways to run a model in one measurement: two servers, asked in turns by the same robot."""

import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from vlm_local.bench.act import Client, load_steps, start_server, summarise
from vlm_local.progress import track
from vlm_local.provenance import describe_machine

_WARM_UP = 10


def run(options, beside: str, num_requests: int) -> int:
    """options: PolicyOptions of the one server. beside: the local model of the other, all else alike."""
    local = replace(options, model=beside, engine="local", engine_url=None)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("one", "other")]
        for each in folders:
            each.mkdir()
        with start_server(options, folders[0]) as one, start_server(local, folders[1]) as other:
            _, steps = load_steps(None)
            times = _measure([Client(server.url, "robot", steps) for server in (one, other)], num_requests)
    names = (f"{options.engine} {options.model}", f"local {beside}")
    summaries = {}
    for name, (round_trip, engine) in zip(names, times, strict=True):
        summaries[name] = {"round_trip_ms": summarise(round_trip), "engine_ms": summarise(engine)}
        for stage, summary in summaries[name].items():
            print(f"{name:32} {stage:14} p50 {summary['p50']:8.2f}   p95 {summary['p95']:8.2f}   n {summary['n']}")
    ratio = round(statistics.median(a / b for a, b in zip(times[0][0], times[1][0], strict=True)), 3)
    print(f"median ratio of round trips, first to second: {ratio}")
    result = {"benchmark": "act", "beside": summaries, "round_trip_ratio": ratio, "request": "json_numpy, 256x256"}
    print(json.dumps({**result, **describe_machine()}))
    return 0


def _measure(clients: list[Client], num_requests: int) -> list[tuple[list[float], list[float]]]:
    """For each client its round trips and its engine's times, in milliseconds, from requests in turns."""
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in clients]
    for index in track(range(_WARM_UP + num_requests), "both", "request"):
        for client, (round_trips, engines) in zip(clients, times, strict=True):
            start = perf_counter()
            stages = client.act()
            if index >= _WARM_UP:
                round_trips.append(1e3 * (perf_counter() - start))
                engines.append(stages["engine"])
    return times
