"""The application with its observers: recording, live page and metrics."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_local.assembly import Policies
from vlm_local.provenance import describe_machine
from vlm_local.server.app import create_app
from vlm_local.server.asked import RecentAnswers, add_asked_routes
from vlm_local.server.live import Hub
from vlm_local.server.metrics import Metrics, add_metrics_route
from vlm_local.server.pages import add_live_routes
from vlm_local.server.recorder import Recorder
from vlm_local.server.service import ServerSettings, Service
from vlm_local.server.state import RobotStates


class ObservedApp:
    """`app` is what a server serves. Call `end_streams` before the last answer and `close` after it."""

    def __init__(
        self,
        policies: Policies,
        settings: ServerSettings,
        run: Path | None,
        max_bytes: int | None = None,
        previous: Path | None = None,
        port: int | None = None,
    ):
        """run, max_bytes: the recording's folder (None for no recording) and the most it may take.

        previous: folder of the run whose holds and grippers go on in this one. port: where it is served.
        Raises ConfigError for a folder that cannot be written.
        """
        self._policies = policies
        self._settings = settings
        self._made_with = describe_machine()
        self._started = time.monotonic()
        self._hub = Hub(self._report_status)
        metrics = Metrics(self._measure)
        self._recorder = None if run is None else Recorder(run, self._describe, max_bytes)
        self._states = RobotStates(run, previous, port)
        self._states.on_hold(self._hub.send_status)
        asked = RecentAnswers(run)
        self.app = create_app(policies, settings, self._states, asked.add)
        self.service: Service = self.app.extensions["vlm_local"]
        self.service.subscribe(self._hub)
        self.service.subscribe(metrics)
        self._recording = None if self._recorder is None else self.service.subscribe(self._recorder)
        self.service.report["recording"] = self.report_recording
        add_live_routes(self.app, self._hub, run)
        add_asked_routes(self.app, asked)
        add_metrics_route(self.app, metrics)

    def end_streams(self) -> None:
        """Close every open page's stream now."""
        self._hub.close()

    def close(self, timeout_s: float) -> bool:
        """Write what is still to be recorded. True when all of it was, in time."""
        end = time.monotonic() + timeout_s
        written = all(
            [subscription.close(max(end - time.monotonic(), 0.1)) for subscription in self.service.subscriptions]
        )
        if self._recorder is not None and written:
            self._recorder.close()
        self._states.close()
        return written

    def report_recording(self) -> dict[str, Any] | None:
        """As Recorder.stats, with the queue before it: `queued`, and its losses in `lost`."""
        if self._recorder is None or self._recording is None:
            return None
        num_dropped = self._recording.num_dropped
        stats = self._recorder.stats()
        stats |= {"queued": self._recording.num_waiting, "lost": stats["lost"] + num_dropped}
        if num_dropped and stats["error"] is None:
            stats["error"] = "the disk is slower than the robots: the queue was full"
        return stats

    def _report_status(self) -> dict[str, Any]:
        """The head of the live page."""
        return {
            **{name: value() for name, value in self.service.report.items()},
            "state": self.service.state,
            "model": self._policies.metadata.get("model"),
            "trained": self._policies.metadata.get("trained"),
            "waiting": self._count_waiting(),
            "uptime_s": time.monotonic() - self._started,
        }

    def _measure(self) -> dict[str, Any]:
        """For a scrape of /metrics."""
        return {
            "state": self.service.state,
            "waiting": self._count_waiting(),
            "metadata": self.service.metadata,
            "recording": self.report_recording(),
        }

    def _count_waiting(self) -> int:
        worker = self._policies.worker
        return 0 if worker is None else worker.num_waiting

    def _describe(self) -> dict[str, Any]:
        """meta.json of the run and of each episode."""
        metadata, settings = self._policies.metadata, self._settings
        kept = {
            "on_fault": settings.on_fault,
            "max_step": settings.max_step,
            "workspace_m": settings.workspace and asdict(settings.workspace),
            "embodiment": settings.embodiment,
        }
        versions = {**self._made_with["versions"], **metadata.get("versions", {})}
        return {**metadata, "server": kept, **self._made_with, "versions": versions}
