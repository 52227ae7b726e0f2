"""Records of what happened, and their delivery to subscribers (recording, metrics, live page) beside the requests."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from vlm_local.server.episodes import Step
from vlm_local.wire import build_details

logger = logging.getLogger(__name__)

QUEUE_BYTES = 2**28  # 1,300 frames of 256x256: four minutes of a robot while the disk hangs


@dataclass(frozen=True, eq=False, kw_only=True)
class StepRecord(Step):
    """One answered step, and to whom.

    time: Unix seconds of the answer. decision: with the action as it was sent, and all timings. details: the object of
    /act?details=1.
    """

    time: float
    request_id: str
    robot: str
    details: Mapping[str, Any]

    @property
    def about(self) -> dict[str, Any]:
        """For a line of log."""
        about = {"episode": self.episode, "step": self.step, "phrase": self.decision.phrase}
        return about | ({"fault": self.decision.fault} if self.decision.fault else {})

    def build_line(self) -> dict[str, Any]:
        """The step as a line of steps.jsonl, and as the live page shows it."""
        observation = self.observation
        line = {**self.details, "time": self.time, "request_id": self.request_id}
        return line | {"instruction": observation.instruction, "proprio": observation.proprio}


@dataclass(frozen=True)
class Refusal:
    """A request for an action or a reset that got an error instead."""

    time: float
    request_id: str
    robot: str
    route: str
    status: int
    reason: str


def build_record(step: Step, robot: str, request_id: str, began: float, waits: Mapping[str, float]) -> StepRecord:
    """began: perf_counter() at the request's first byte. waits: milliseconds of what came before the policy."""
    timings = {**waits, **step.decision.timings_ms, "total": 1e3 * (perf_counter() - began)}
    decision = replace(step.decision, action=step.sent.action, timings_ms=timings)
    frame = {"frame": step.sent.frame, "meant": step.sent.meant.tolist(), "shadow": step.sent.shadow}
    where = {"model": step.model, "robot": robot, "episode": step.episode, "step": step.step}
    details = build_details(decision, **where, **frame, seed=step.seed, started_by=step.started_by)
    told = {**vars(step), "decision": decision}
    return StepRecord(**told, time=time.time(), request_id=request_id, robot=robot, details=details)


Record = StepRecord | Refusal
Subscriber = Callable[[Record], None]


class Subscription:
    """Hands records to one subscriber, in a thread of its own. Where it falls behind, records are dropped and counted.

    max_bytes: of records that wait. num_dropped: records lost so far.
    """

    def __init__(self, subscriber: Subscriber, max_bytes: int = QUEUE_BYTES):
        self._subscriber = subscriber
        self._max_bytes = max_bytes
        self._queue: queue.SimpleQueue[Record | None] = queue.SimpleQueue()
        self._num_bytes = 0
        self._lock = threading.Lock()
        self.num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="subscription", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Records that are queued."""
        return self._queue.qsize()

    def put(self, record: Record) -> None:
        """Queue a record; never waits. Any thread may call it."""
        size = _measure(record)
        with self._lock:
            if self._num_bytes + size > self._max_bytes:
                self.num_dropped += 1
                return
            self._num_bytes += size
        self._queue.put(record)

    def close(self, timeout_s: float = 5.0) -> bool:
        """Deliver what is queued. True when all of it went out in time."""
        self._queue.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (record := self._queue.get()) is not None:
            try:
                self._subscriber(record)
            except Exception:
                self.num_dropped += 1
                logger.exception("a record was lost")
            with self._lock:
                self._num_bytes -= _measure(record)


def _measure(record: Record) -> int:
    """Bytes it keeps in memory, roughly."""
    return 4096 + (record.observation.image.nbytes if isinstance(record, StepRecord) else 0)
