"""Keeps the last 64 steps of each robot and streams them to open pages (server-sent events). Knows no HTTP."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vlm_local.data.images import encode_file
from vlm_local.errors import RequestError
from vlm_local.files import encode_json
from vlm_local.server.records import Record, Refusal

KEPT_STEPS = 64  # of each robot, as many as the page's plot shows
MAX_SHOWN = 32  # robots; the server forgets those that are long gone, too
MAX_FRAMES = 2**27  # bytes of their newest pictures together; without the largest where they are more
MAX_VIEWERS = 8  # each holds one HTTP thread as long as it watches
_BACKLOG = 256
_STATUS_EVERY_S = 1.0
_JPEG_QUALITY = 88


class Hub:
    """A subscriber. Records come from its subscription's thread; HTTP threads ask for streams and frames."""

    def __init__(self, report_status: Callable[[], Mapping[str, Any]]):
        """report_status: what the page's head shows beside the counts kept here."""
        self._report_status = report_status
        self._lock = threading.Lock()
        self._encoding = threading.Lock()
        self._steps: dict[str, deque[dict[str, Any]]] = {}
        self._frames: dict[str, np.ndarray] = {}  # robot -> uint8 (H, W, 3), the newest
        self._viewers: list[queue.Queue[str | None]] = []
        self._counts = {"episodes": 0, "steps": 0, "held_steps": 0, "faults": 0, "refusals": 0}
        self._last_refusal: str | None = None
        self._closed = False

    def __call__(self, record: Record) -> None:
        if isinstance(record, Refusal):
            with self._lock:
                self._counts["refusals"] += 1
                self._last_refusal = f"{record.robot} {record.route}: {record.status} {record.reason}"
            return
        step = record.build_line()
        message = _encode_event("step", step)
        with self._lock:
            steps = self._steps.setdefault(record.robot, deque(maxlen=KEPT_STEPS))
            if len(self._steps) > MAX_SHOWN:
                self._drop_oldest(beside=record.robot)
            self._counts["episodes"] += not steps or steps[-1]["episode"] != record.episode
            self._counts["steps"] += 1
            is_held = "hold" in record.decision.extra
            self._counts["held_steps"] += is_held
            self._counts["faults"] += record.decision.fault is not None and not is_held
            steps.append(step)
            self._frames[record.robot] = record.observation.image
            if sum(frame.nbytes for frame in self._frames.values()) > MAX_FRAMES:
                del self._frames[max(self._frames, key=lambda robot: self._frames[robot].nbytes)]
            for viewer in self._viewers:
                _put(viewer, message)

    def _drop_oldest(self, beside: str) -> None:
        oldest = min(self._steps.keys() - {beside}, key=lambda robot: self._steps[robot][-1]["time"])
        del self._steps[oldest]
        self._frames.pop(oldest, None)

    def watch(self) -> Iterator[str]:
        """Server-sent events: one `snapshot`, then each `step`, and `status` every second.

        A viewer that falls behind misses steps, never holds anyone up. Raises RequestError (503)
        where the places are taken, and after `close`.
        """
        viewer: queue.Queue[str | None] = queue.Queue(_BACKLOG)
        with self._lock:
            if self._closed:
                raise RequestError("the server is stopping", 503)
            if len(self._viewers) >= MAX_VIEWERS:
                raise RequestError(f"the page is open {MAX_VIEWERS} times already; close one", 503)
            self._viewers.append(viewer)
            robots = {robot: list(steps) for robot, steps in self._steps.items()}
        stream = self._stream(viewer, _encode_event("snapshot", {"now": time.time(), "robots": robots}))
        next(stream)  # into its try, so that a stream that nobody ever reads gives its place back, too
        return stream

    def send_status(self) -> None:
        """To every viewer now, not at the next second."""
        message = self._encode_status()
        with self._lock:
            for viewer in self._viewers:
                _put(viewer, message)

    def _stream(self, viewer: "queue.Queue[str | None]", first: str) -> Iterator[str]:
        try:
            yield ""
            yield first + self._encode_status()
            due = time.monotonic() + _STATUS_EVERY_S
            while True:
                try:
                    message = viewer.get(timeout=max(due - time.monotonic(), 0.0))
                except queue.Empty:
                    message = self._encode_status()
                    due = time.monotonic() + _STATUS_EVERY_S
                if message is None:
                    return
                yield message
        finally:
            with self._lock:
                self._viewers.remove(viewer)

    def encode_frame(self, robot: str, lossless: bool) -> bytes:
        """The newest frame of a robot as JPEG (or PNG). Raises RequestError (404) where there is none."""
        with self._lock:
            frame = self._frames.get(robot)
        if frame is None:
            raise RequestError(f"there is no frame of robot {robot!r}", 404)
        with self._encoding:  # on one processor, as the model needs the others
            if lossless:
                return encode_file(frame, "PNG", compress_level=1)
            return encode_file(frame, "JPEG", quality=_JPEG_QUALITY)

    def close(self) -> None:
        """End every stream now."""
        with self._lock:
            self._closed = True
            for viewer in self._viewers:
                _put(viewer, None)

    def _encode_status(self) -> str:
        with self._lock:
            counts = {**self._counts, "last_refusal": self._last_refusal, "viewers": len(self._viewers)}
        return _encode_event("status", {**counts, **self._report_status()})


def _put(viewer: "queue.Queue[str | None]", message: str | None) -> None:
    """Into a viewer's queue; a full one loses its oldest message."""
    while True:
        try:
            return viewer.put_nowait(message)
        except queue.Full:
            try:
                viewer.get_nowait()
            except queue.Empty:
                continue


def _encode_event(name: str, value: Any) -> str:
    return f"event: {name}\ndata: {encode_json(value)}\n\n"
