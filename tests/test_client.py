import base64
import http.server
import itertools
import json
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

import vlm_local.client
from tests.serving import ACTION, IMAGE, PHRASE, SteeredEngine, serve
from vlm_local.client import Detector, PolicyClient, PolicyError, parse_action
from vlm_local.errors import EngineError, RequestError
from vlm_local.remote_policy import RemotePolicy
from vlm_local.server.service import ServerSettings
from vlm_local.types import Observation
from vlm_local.wire import encode_array

OBSERVATION = Observation(IMAGE, "lift the cup", np.array([0.3, 0, 0.1, 0, 0, 0, 0.5]))


class _Listener(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


class ForeignServer:
    """A server of AutoEval's protocol that is not ours: answers as told, remembers what came.

    bodies: (path, body) of each POST. connections: the paths that each connection asked. ends_after: so many POSTs it
    is gone; None for never.
    """

    def __init__(self, *answers: bytes, reset_status=404):
        """answers: to /act, in order, over and over; other paths get the first."""
        answers = answers or (b"[0, 0, 0, 0, 0, 0, 1]",)
        in_turn = itertools.cycle(answers)
        self.reset_status, self.bodies, self.connections = reset_status, [], {}
        self.ends_after: int | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # or a body waits for the acknowledgement of its headers

            def do_POST(self):
                outer.connections.setdefault(self.client_address, []).append(self.path)
                outer.bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"] or 0))))
                if outer.ends_after is not None and len(outer.bodies) > outer.ends_after:
                    self.close_connection = True
                    return outer.server.server_close()
                if self.path == "/act":
                    self._send(200, next(in_turn))
                else:
                    self._send(outer.reset_status, answers[0])

            def do_GET(self):
                self._send(404, b"not here")

            def _send(self, status, body):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = _Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    @property
    def asked(self):
        """What /act was asked, as JSON."""
        return [json.loads(body) for path, body in self.bodies if path == "/act"]


def test_our_own_server_gives_details_and_takes_seeds():
    with serve() as server:
        policy = RemotePolicy(f"{server.url}/s/left")
        policy.reset(7)
        decision = policy.act(OBSERVATION)
        np.testing.assert_array_equal(decision.action, ACTION)
        assert (decision.phrase, decision.probability, decision.fault) == (PHRASE, 1.0, None)
        assert decision.marginals["x"] == (0.0, 0.0, 1.0)
        assert decision.timings_ms["http"] >= decision.timings_ms["total"] > decision.timings_ms["engine"]
        record = server.newest_record()
        assert (record.seed, record.robot) == (7, "left")
        np.testing.assert_array_equal(record.observation.proprio, OBSERVATION.proprio)
        assert policy.metadata["model"] == "steered" and policy.metadata["url"].endswith("/s/left")


def test_a_foreign_server_gets_autoevals_layout_and_needs_no_reset():
    with ForeignServer(json.dumps(encode_array(np.array(ACTION))).encode()) as server:
        policy = RemotePolicy(server.url)
        policy.reset(7)
        for _ in range(3):
            decision = policy.act(OBSERVATION)
        np.testing.assert_array_equal(decision.action, ACTION)
        assert decision.phrase is None
        assert server.bodies[0] == ("/reset", b"")
        sent = json.loads(server.bodies[1][1])["proprio"]
        proprio = np.frombuffer(base64.b64decode(sent["__numpy__"]), sent["dtype"])
        np.testing.assert_allclose(proprio, [0.3, 0, 0.1, 0, 0, 0, 0, 0.195])
        assert len(server.connections) == 1, "the connection was not kept"


@pytest.mark.parametrize("status", [404, 405, 501])
def test_a_server_that_knows_no_reset_is_left_in_peace(status):
    with ForeignServer(reset_status=status) as server:
        RemotePolicy(server.url).reset(0)


def test_a_reset_that_fails_is_told_unless_there_is_none():
    with ForeignServer(reset_status=500) as server, pytest.raises(EngineError, match="500"):
        RemotePolicy(server.url).reset(0)


ARRAY = json.dumps(encode_array(np.array(ACTION)))


@pytest.mark.parametrize("answer", [json.dumps(ACTION), ARRAY, json.dumps(ARRAY), json.dumps(json.dumps(ACTION))])
def test_every_form_of_an_action_is_read(answer):
    np.testing.assert_array_equal(parse_action(answer.encode()), ACTION)


@pytest.mark.parametrize(
    "answer",
    [
        *(b"", b"{}", b"[1, 2]", b"null", b'"hello"', b"[0, 0, 0, 0, 0, 0, NaN]", b"[[0], 1]", b"\xff"),
        *(b'["0", "0", "0", "0", "0", "0", "1"]', b"[" + b"true, " * 6 + b"true]", b"[[0, 0, 0, 0, 0, 0, 1]]"),
        b'{"__numpy__": 3}',
    ],
)
def test_what_is_no_action_is_an_error(answer):
    with pytest.raises(PolicyError, match="7 finite numbers"):
        parse_action(answer)
    with ForeignServer(answer) as server, pytest.raises(EngineError):
        RemotePolicy(server.url).act(OBSERVATION)


def test_faults_are_typed():
    with pytest.raises(EngineError, match="is the server running"):
        RemotePolicy("http://127.0.0.1:9").act(OBSERVATION)
    with serve(SteeredEngine(), ServerSettings(on_fault="error")) as server:
        policy = RemotePolicy(server.url)
        with pytest.raises(RequestError, match="sides 16 to 4096"):
            policy.act(Observation(IMAGE[:4], "go"))
        server.engine.fault = RuntimeError("out of memory")
        with pytest.raises(EngineError, match="503: the model failed: RuntimeError: out of memory"):
            policy.act(OBSERVATION)
        server.engine.fault = None
        server.engine.gate.clear()
        with pytest.raises(EngineError, match="timed out"):
            RemotePolicy(server.url, timeout_s=0.5).act(OBSERVATION)
        server.engine.gate.set()


@pytest.mark.parametrize("url", ["ftp://host", "http://", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="expected a URL"):
        PolicyClient(url)


def test_an_address_is_shown_without_its_secrets():
    client = PolicyClient("http://me:secret@127.0.0.1:9/t/hidden/s/left/")
    assert client.url == "http://127.0.0.1:9/t/***/s/left"
    with pytest.raises(PolicyError, match=r"^http://127\.0\.0\.1:9/t/\*\*\*/s/left/reset gave no answer"):
        client.reset()


def test_our_own_server_may_be_reached_under_any_name(monkeypatch):
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda address, *options: connect(("127.0.0.1", address[1]), *options)
    )
    with serve() as server:
        assert PolicyClient(f"http://gpu-box.example:{server.port}").act(IMAGE, "go")["step"] == 0


def test_the_file_alone_works_without_the_package(tmp_path):
    shutil.copy(vlm_local.client.__file__, tmp_path / "client.py")
    script = (
        "import sys, numpy as np; from client import PolicyClient\n"
        "client = PolicyClient(sys.argv[1]); client.reset(seed=3)\n"
        "print(client.act(np.zeros((64, 64, 3), np.uint8), 'go')['phrase'])\n"
        "assert 'vlm_local' not in sys.modules\n"
    )
    with serve() as server:
        result = subprocess.run(
            [sys.executable, "-c", script, server.url], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
    assert result.stdout.strip() == PHRASE, result.stderr


@pytest.mark.parametrize("probability", ["NaN", "Infinity", "-0.5", '"1"'])
def test_the_detector_does_not_believe_a_probability_that_is_none(probability):
    answer = f'{{"answer": "yes", "probability": {probability}}}'.encode()
    with ForeignServer(answer, reset_status=200) as foreign, pytest.raises(PolicyError, match="gave the probability"):
        Detector(foreign.url)("is it open? answer yes or no", IMAGE, answer="yes")


def test_the_detector_holds_no_threshold_without_probabilities():
    with ForeignServer(b'{"answer": "yes"}', reset_status=200) as foreign:
        assert Detector(foreign.url)("is it open? answer yes or no", IMAGE, answer="yes") is True
        with pytest.raises(PolicyError, match="gives no probabilities"):
            Detector(foreign.url, threshold=0.5)("is it open? answer yes or no", IMAGE, answer="yes")
