"""A server with the embedded model on the device: how fast, and what a killed engine leaves behind."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from vlm_local.bench.act import BenchServer, Client, list_processes, load_steps, measure_alone, start_server
from vlm_local.bench.subject import summarise_ms
from vlm_local.errors import EngineError
from vlm_local.policy_options import PolicyOptions
from vlm_local.provenance import describe_machine

_ENOUGH_S = 60.0  # for a model of 11 MB to be loaded again, or its memory to be given back
_ROUGHLY = 64 << 20  # bytes: what else a driver may hold


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    num_requests = parser.parse_args().requests
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    memory = {"before": read_used_bytes()}
    with tempfile.TemporaryDirectory() as folder:
        options = PolicyOptions(model="tiny", device=device)
        # After a fault the answer would be a hold, and the robot none the wiser.
        with start_server(options, Path(folder), ["--on-fault", "error"]) as server:
            client = Client(server.url, "robot", load_steps(None)[1])
            times = measure_alone(client, num_requests)
            memory["serving"] = read_used_bytes()
            kill_engine(server)
            faults, again_s = wait_for_answer(client)
            memory["after the kill"] = read_used_bytes()
    gone = wait_until(lambda: read_used_bytes() <= memory["before"] + _ROUGHLY)
    memory["after the end"] = read_used_bytes()
    leaks = memory["after the kill"] > memory["serving"] + _ROUGHLY
    result = {
        "benchmark": "serve",
        "model": "tiny",
        "device": device,
        "ms": {name: summarise_ms(values) for name, values in times.items()},
        "faults_after_kill": faults,
        "answers_again_after_s": round(again_s, 2),
        "gpu_memory_mb": {name: round(used / 2**20, 1) for name, used in memory.items()},
        "memory_given_back": gone and not leaks,
        "start_up_s": round(server.start_up_s, 2),
    }
    print(json.dumps({**result, **describe_machine()}))
    return 0 if gone and not leaks else 1


def read_used_bytes() -> int:
    """What all processes together hold of the GPU's memory; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info(0)
    return total - free


def kill_engine(server: BenchServer) -> None:
    """SIGKILL for the server's child with the model, and wait until it runs no more."""
    [engine] = [each for each in list_processes(server.pid) if "vlm_local.engines.process" in each.cmdline()]
    engine.kill()
    # The server collects its exit status with the next request; a zombie until then.
    if not wait_until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE):
        raise EngineError("the engine's process survived SIGKILL")


def wait_for_answer(client: Client) -> tuple[int, float]:
    """How many steps failed, and the seconds until one was answered."""
    start = time.monotonic()
    for faults in range(1000):
        try:
            client.act()
            return faults, time.monotonic() - start
        except EngineError:
            time.sleep(0.1)
    raise EngineError("the server did not answer again")


def wait_until(condition) -> bool:
    end = time.monotonic() + _ENOUGH_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


if __name__ == "__main__":
    sys.exit(main())
