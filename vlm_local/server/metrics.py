"""Prometheus metrics: counters are updated as records come, gauges are measured at each scrape.

The registry is the application's own, not the global one, so that tests and two servers in a process stay apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from flask import Flask, Response, request
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from vlm_local.server.access import DEFAULT_ROBOT
from vlm_local.server.records import Record, Refusal

MAX_NAMES = 64  # of robots; those that come later are counted together, as "other"
STATES = ("loading", "healthy", "stuck", "failed", "stopping", "closed")
# From a held phrase, answered from memory, to AutoEval's time-out; 0.2 s is the budget at 5 Hz.
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0, 8.0)


class Metrics:
    """A subscriber. `registry` holds what it counts and what `measure` reports at each scrape."""

    def __init__(self, measure: Callable[[], Mapping[str, Any]]):
        """measure: see `_Measured`."""
        self.registry = CollectorRegistry(auto_describe=True)
        named = {"namespace": "vlm_local", "registry": self.registry}
        self.requests = Counter("requests", "Answered HTTP requests.", ("route", "status"), **named)
        self._steps = Counter("steps", "Control steps answered with an action.", ("robot",), **named)
        self._episodes = Counter("episodes", "Episodes begun, and what began them.", ("robot", "started_by"), **named)
        self._phrases = Counter("phrases", "Phrases answered.", ("phrase",), **named)
        self._faults = Counter("faults", "Stand-stills in place of an answer.", ("robot",), **named)
        self._held = Counter("held_steps", "Steps stood still because a person held the robot.", ("robot",), **named)
        self._refusals = Counter("refusals", "Requests for an action or a reset refused.", ("robot", "status"), **named)
        self._cuts = Counter("safety_cuts", "Actions cut to the workspace or largest step.", ("axis",), **named)
        self._stages = Histogram("stage_seconds", "Time a step spent.", ("stage",), buckets=_BUCKETS_S, **named)
        # Names to count refusals by; whoever is refused may have made up another for each request.
        self._robots = {DEFAULT_ROBOT}
        self.registry.register(_Measured(measure))
        ProcessCollector(registry=self.registry)

    def __call__(self, record: Record) -> None:
        if isinstance(record, Refusal):
            self._refusals.labels(record.robot if record.robot in self._robots else "unknown", record.status).inc()
            return
        if record.robot not in self._robots and len(self._robots) >= MAX_NAMES:
            record = replace(record, robot="other")
        self._robots.add(record.robot)
        decision = record.decision
        self._steps.labels(record.robot).inc()
        if record.step == 0:
            self._episodes.labels(record.robot, record.started_by).inc()
        if decision.phrase is not None:
            self._phrases.labels(decision.phrase).inc()
        if "hold" in decision.extra:
            self._held.labels(record.robot).inc()
        elif decision.fault is not None:
            self._faults.labels(record.robot).inc()
        for axis in decision.extra.get("cut", ()):
            self._cuts.labels(axis).inc()
        for stage, ms in record.details["timings_ms"].items():
            self._stages.labels(stage).observe(ms / 1e3)


class _Measured(Collector):
    """What is read at a scrape: `state`, `waiting`, `metadata`, and `recording` (written, lost; or None)."""

    def __init__(self, measure: Callable[[], Mapping[str, Any]]):
        self._measure = measure

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        now = self._measure()
        state = GaugeMetricFamily("vlm_local_state", "1 at the state the model is in.", labels=("state",))
        for name in STATES:
            state.add_metric((name,), float(name == now["state"]))
        yield state
        yield GaugeMetricFamily("vlm_local_waiting_requests", "Requests waiting for the engine.", now["waiting"])
        metadata = now["metadata"]
        about = {name: str(metadata[name]) for name in ("model", "engine", "device", "dtype") if name in metadata}
        yield InfoMetricFamily("vlm_local_model", "What answers.", about)
        if "memory_bytes" in metadata:
            text = "Weights and buffers of the model."
            yield GaugeMetricFamily("vlm_local_model_memory_bytes", text, metadata["memory_bytes"])
        if "counters" in metadata:
            text = "What the servers behind the engine did: requests, retries, failures by kind."
            events = CounterMetricFamily("vlm_local_engine_events", text, labels=("kind",))
            for kind, count in metadata["counters"].items():
                events.add_metric((kind,), count)
            yield events
        if now["recording"] is not None:
            for name, text in (("written", "Steps recorded."), ("lost", "Steps answered but not recorded.")):
                yield CounterMetricFamily(f"vlm_local_recorded_steps_{name}", text, now["recording"][name])


def add_metrics_route(app: Flask, metrics: Metrics) -> None:
    """GET /metrics, and a count of every answered request."""

    @app.after_request
    def count(response: Response):
        route = request.url_rule.rule if request.url_rule else "unknown"
        metrics.requests.labels(route, response.status_code).inc()
        return response

    @app.get("/metrics")
    def show():
        return Response(generate_latest(metrics.registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)
