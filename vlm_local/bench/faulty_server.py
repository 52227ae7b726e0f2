"""A policy server whose engine fails at random, in every way an engine can.

Run as `python -m vlm_local.bench.faulty_server SETTINGS`, a JSON object: `options` (PolicyOptions),
`record` (folder), `fault_rate`, `seed`. Prints what `serve` prints when it is ready.
"""

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm_local.assembly import open_policies
from vlm_local.engines import Engine, Outcome
from vlm_local.errors import EngineError
from vlm_local.policy_options import PolicyOptions
from vlm_local.processes import share_heaps
from vlm_local.server.serve import RunningServer, RunOptions, bind, serve_until_stopped
from vlm_local.server.service import ServerSettings
from vlm_local.types import GenerationRequest

# What a fault is, and how often it is that: a hang stops all robots for seconds.
KINDS = {"engine error": 0.35, "exception": 0.3, "out of memory": 0.3, "hang": 0.05}


class FaultyEngine:
    """Fails a share of the calls of `engine`: raises, or hangs for longer than the deadline."""

    def __init__(self, engine: Engine, rate: float, seed: int, hang_s: float):
        self.max_batch = engine.max_batch
        self._engine = engine
        self._rate = rate
        self._hang_s = hang_s
        self._random = np.random.default_rng(seed)
        self._injected: Counter[str] = Counter()

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {**self._engine.metadata, "injected_faults": dict(self._injected)}

    def generate(self, requests: Sequence[GenerationRequest]) -> Sequence[Outcome]:
        is_warm_up = any(request.episode == "warm-up" for request in requests)
        if not is_warm_up and self._random.random() < self._rate:
            self._fail(str(self._random.choice(list(KINDS), p=list(KINDS.values()))))
        return self._engine.generate(requests)

    def forget(self, episode: str) -> None:
        self._engine.forget(episode)

    def end(self) -> None:
        getattr(self._engine, "end", lambda: None)()

    def close(self) -> None:
        self._engine.close()

    def _fail(self, kind: str) -> None:
        self._injected[kind] += 1
        if kind == "hang":
            time.sleep(self._hang_s)
        elif kind == "exception":
            raise RuntimeError("injected: a bug in the engine")
        elif kind == "out of memory":
            raise MemoryError("injected: no memory left")
        else:
            raise EngineError("injected: the engine gave up")


def main() -> None:
    share_heaps()
    wanted = json.loads(sys.argv[1])
    options = PolicyOptions(**wanted["options"])
    hang_s = 1.5 * (options.deadline_ms or 0.0) / 1e3
    policies = open_policies(
        options, wrap=lambda engine: FaultyEngine(engine, wanted["fault_rate"], wanted["seed"], hang_s), apart=True
    )
    listener = bind("127.0.0.1", 0)
    server = RunningServer(policies, ServerSettings(), RunOptions(record=Path(wanted["record"])), listener)
    serve_until_stopped(server, lambda: None, lambda: print(f"ready: {server.url}", flush=True))
    logging.shutdown()
    os._exit(0)  # as `serve` does: a forward, or a hang that was injected, may still run


if __name__ == "__main__":
    main()
