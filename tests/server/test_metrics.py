from prometheus_client.parser import text_string_to_metric_families

from tests.engines.fake_server import FakeServer
from tests.server.observing import observe
from tests.serving import GRAMMAR, PHRASE, build_body, find_free_port, until
from vlm_local.engines.openai import OpenAIEngine
from vlm_local.errors import EngineError
from vlm_local.safety import Workspace
from vlm_local.server.service import ServerSettings


def _scrape(server) -> dict:
    """(name, labels) -> value."""
    status, headers, body = server.get("/metrics")
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(body.decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def _value(samples: dict, name: str, **labels) -> float:
    return samples[f"vlm_local_{name}", frozenset(labels.items())]


def test_a_scrape_tells_what_happened(tmp_path):
    settings = ServerSettings(workspace=Workspace((0.2, 0.301), (-1, 1), (0, 1)))
    with observe(tmp_path, settings) as server:
        for _ in range(3):
            server.act("/s/left/act?details=1")
        server.engine.fault = EngineError("out of memory")
        server.act("/s/left/act?details=1")
        server.post("/act", b"{")
        server.get("/no/such/page")
        until(
            lambda: _scrape(server).get(
                ("vlm_local_refusals_total", frozenset([("robot", "robot"), ("status", "400")]))
            )
        )
        until(lambda: _value(_scrape(server), "recorded_steps_written_total") == 4)
        samples = _scrape(server)
    assert _value(samples, "requests_total", route="/act", status="200") == 4
    assert _value(samples, "requests_total", route="/act", status="400") == 1
    assert _value(samples, "requests_total", route="unknown", status="404") == 1
    assert _value(samples, "steps_total", robot="left") == 4
    assert _value(samples, "episodes_total", robot="left", started_by="first request") == 1
    assert _value(samples, "phrases_total", phrase=PHRASE) == 3
    assert _value(samples, "faults_total", robot="left") == 1
    assert _value(samples, "safety_cuts_total", axis="x") == 3  # 0.3 + 0.0125 leaves the box
    assert _value(samples, "stage_seconds_count", stage="total") == 4
    assert 0 < _value(samples, "stage_seconds_sum", stage="engine") < 10
    assert _value(samples, "state", state="healthy") == 1 and _value(samples, "state", state="stuck") == 0
    assert _value(samples, "waiting_requests") == 0
    assert _value(samples, "recorded_steps_lost_total") == 0
    assert _value(samples, "model_info", model="steered", engine="scripted") == 1
    assert any(name == "process_resident_memory_bytes" for name, _ in samples)


def test_robots_beyond_so_many_are_counted_together(monkeypatch):
    monkeypatch.setattr("vlm_local.server.metrics.MAX_NAMES", 2)  # one is the unnamed robot's
    with observe() as server:
        for name in ("left", "right", "third", "left"):
            server.act(f"/s/{name}/act?details=1")
        until(lambda: _scrape(server).get(("vlm_local_stage_seconds_count", frozenset([("stage", "total")]))) == 4)
        samples = _scrape(server)
    assert _value(samples, "steps_total", robot="left") == 2 and _value(samples, "steps_total", robot="other") == 2
    assert ("vlm_local_steps_total", frozenset([("robot", "third")])) not in samples


def test_names_that_are_made_up_take_no_memory():
    with observe(settings=ServerSettings(max_robots=2)) as server:
        for name in ("left", "right"):
            server.act(f"/s/{name}/act?details=1")
        for name in ("left", "a", "b", "c"):
            server.post(f"/s/{name}/reset", b"{")
        refused = "vlm_local_refusals_total"
        until(lambda: sum(value for (name, _), value in _scrape(server).items() if name == refused) == 4)
        samples = _scrape(server)
    assert _value(samples, "refusals_total", robot="left", status="400") == 1
    assert sum(name == refused for name, _ in samples) == 2


def test_two_servers_in_one_process_count_apart():
    with observe() as one, observe() as other:
        one.post("/act", build_body())
        assert _value(_scrape(one), "requests_total", route="/act", status="200") == 1
        assert ("vlm_local_requests_total", frozenset([("route", "/act"), ("status", "200")])) not in _scrape(other)


def test_failures_of_the_servers_behind_an_engine_are_counted_by_kind():
    with FakeServer() as behind:
        engine = OpenAIEngine([behind.url], "tiny")
        with observe(engine=engine) as server:
            answered = server.act()
            behind.habit = "429"
            held = server.act()
            samples = _scrape(server)
    assert answered["phrase"] in GRAMMAR.sentences and 0 < answered["probability"] <= 1
    assert held["phrase"] is None and "rate limit" in held["fault"]
    assert _value(samples, "engine_events_total", kind="rate_limited") == 1
    assert _value(samples, "engine_events_total", kind="requests") == 2


def test_health_tells_when_no_server_behind_an_engine_can_be_reached():
    port = find_free_port()
    with FakeServer(port=port) as behind:
        engine = OpenAIEngine([behind.url], "tiny")
        with observe(engine=engine) as server:
            assert server.get("/health")[0] == 200
            behind.close()
            assert server.act()["fault"]
            until(lambda: server.get("/health")[0] == 503)
            with FakeServer(port=port):
                until(lambda: server.get("/health")[0] == 200)
                assert server.act()["fault"] is None
