import json
import threading

import numpy as np
import pytest

from tests.serving import ACTION, GRAMMAR, SteeredEngine, serve
from tests.test_client import ForeignServer
from vlm_local.cli import main
from vlm_local.doctor import build_cases, examine, judge_action
from vlm_local.engines.scripted import build_uniform_engine
from vlm_local.errors import EngineError
from vlm_local.server.service import ServerSettings
from vlm_local.wire import decode_act, encode_array


class SeeingEngine(SteeredEngine):
    """Says what the image's mean tells it to."""

    def __init__(self):
        super().__init__()
        self._weigh = lambda request: np.exp(np.arange(len(GRAMMAR.sentences)) * request.image.mean() / 1e4)


def _verdicts(url):
    return {finding.name: finding for finding in examine(url)}


def _find(url, name):
    """The finding of this name; what would be looked at after it is not."""
    return next(finding for finding in examine(url) if finding.name == name)


def test_our_own_server_passes_every_case(monkeypatch):
    monkeypatch.setattr("vlm_local.doctor.CONTROL_PERIOD_MS", 60_000)  # however busy this machine is
    with serve(SeeingEngine()) as server:
        findings = _verdicts(server.url)
    assert [str(f) for f in findings.values() if f.verdict != "ok"] == []
    assert {case.name for case in build_cases()} <= set(findings)
    assert "the probabilities move" in findings["depends on the image"].text
    assert "50 requests" in findings["latency"].text


def test_a_server_too_slow_for_5_hz_is_told_so(monkeypatch):
    monkeypatch.setattr("vlm_local.doctor.CONTROL_PERIOD_MS", 0)
    with serve() as server:
        latency = _find(server.url, "latency")
    assert latency.verdict == "warn" and "5 Hz control leaves 0 ms" in latency.text


def test_a_constant_answer_is_told_from_one_that_draws():
    with serve(build_uniform_engine(), decide="sample") as server:
        assert "changed nothing" in _verdicts(server.url)["depends on the image"].text  # seeded, so the same draws
    draws = np.random.default_rng(0).uniform(-0.01, 0.01, (1000, 7)).tolist()
    with ForeignServer(*(json.dumps(draw).encode() for draw in draws)) as server:
        finding = _verdicts(server.url)["depends on the image"]
    assert finding.verdict == "warn" and finding.text.startswith("unknown")


def test_a_foreign_server_of_lists_passes_all_but_the_double_encoded():
    with ForeignServer(json.dumps(ACTION).encode()) as server:
        findings = _verdicts(server.url)
    assert [name for name, finding in findings.items() if finding.verdict == "FAIL"] == ["double-encoded"]
    assert "no /health (404)" in findings["health"].text
    assert findings["broken request"].verdict == "warn"  # it answers whatever comes


def test_a_client_resets_on_the_connection_of_its_steps():
    with ForeignServer(json.dumps(ACTION).encode()) as server:
        _verdicts(server.url)
    paths = list(server.connections.values())
    assert ["/reset", "/act", "/act", "/act"] in paths and ["/reset", *["/act"] * 50] in paths


def test_an_object_instead_of_an_array_fails_as_it_would_end_an_evaluation():
    with ForeignServer(b'{"action": [0, 0, 0, 0, 0, 0, 1]}') as server:
        finding = _find(server.url, "autoeval rollout")
    assert finding.verdict == "FAIL" and "7 finite numbers" in finding.text


def test_a_reset_that_ends_the_job_fails():
    with ForeignServer(json.dumps(ACTION).encode(), reset_status=500) as server:
        assert "ends the job" in _find(server.url, "reset").text


def test_a_server_that_is_loading_or_gone_is_the_only_finding():
    looked = threading.Event()

    def load():
        looked.wait(60)
        raise EngineError("too late")

    with serve(load) as server:
        findings = list(examine(server.url))
        looked.set()
        assert [f.verdict for f in findings] == ["FAIL"] and "503" in findings[0].text
    gone = list(examine(server.url))
    assert [f.verdict for f in gone] == ["FAIL"] and "is the server running" in gone[0].text


def test_faults_that_are_errors_fail_with_the_servers_words():
    with serve(settings=ServerSettings(on_fault="error")) as server:
        server.engine.fault = RuntimeError("CUDA out of memory")
        assert "CUDA out of memory" in _find(server.url, "autoeval rollout").text


def test_a_path_is_no_address_for_autoevals_form():
    with serve() as server:
        assert _find(f"{server.url}/s/left", "address").verdict == "warn"


@pytest.mark.parametrize(
    ("action", "sentence"), [([0.06, 0, 0, 0, 0, 0, 1], "0.05 m"), ([0, 0, 0, 0, 0, -0.3, 1], "0.25 rad")]
)
def test_a_step_the_arm_would_refuse_fails(action, sentence):
    with pytest.raises(Exception, match=sentence):
        judge_action(json.dumps(action).encode(), ("list",))


def test_the_form_must_be_one_the_client_reads():
    array = json.dumps(encode_array(np.array(ACTION))).encode()
    assert judge_action(array, ("list", "array")) == "array of 7"
    with pytest.raises(Exception, match="reads a JSON list"):
        judge_action(array, ("list",))


def test_the_cases_are_requests_our_codec_reads_as_meant():
    messages = {case.name: decode_act(case.body) for case in build_cases()}
    assert messages["autoeval submission test"].instruction == "test connection"
    assert not messages["autoeval submission test"].image.any()
    assert messages["double-encoded"].form == "encoded"
    assert messages["openvla with proprio"].state[6] == 1.0
    assert messages["autoeval rollout"].state[7] == pytest.approx(0.38)
    np.testing.assert_array_equal(messages["plain, base64 png"].image, messages["plain, nested list"].image)


def test_the_command_prints_a_line_a_case_and_exits_1_when_one_fails(capsys):
    with serve() as server:
        assert main(["doctor", server.url]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ok  ") >= 15 and "changed nothing" in printed
    assert main(["doctor", server.url]) == 1
    assert "FAIL  health" in capsys.readouterr().out
    assert main(["doctor", "ftp://host"]) == 2
    assert "expected a URL" in capsys.readouterr().err
