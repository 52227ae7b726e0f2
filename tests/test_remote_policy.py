"""A policy behind another server: what it says is checked, on the way to an evaluation as to a robot."""

import contextlib
import json
import select
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from tests.serving import IMAGE, ask, build_body, serve, until
from vlm_local.answers import Question, ask_server
from vlm_local.assembly import open_policies
from vlm_local.client import Detector, PolicyClient, PolicyError
from vlm_local.errors import EngineError, RequestError
from vlm_local.policy_options import PolicyOptions
from vlm_local.remote_policy import RemotePolicy
from vlm_local.server.app import create_app
from vlm_local.server.serve import HTTPServer, bind
from vlm_local.server.service import ServerSettings
from vlm_local.types import AXES, Observation

ANSWER = {"action": [0.0] * 6 + [1.0], "phrase": "stop", "timings_ms": {"engine": 2.0}}


class FakePolicyServer:
    """Says it is one of ours. answer, metadata: its next ones, as bytes or JSON. status: of both.

    asked: the paths so far. cuts: how many of the next POSTs are read and then dropped without an answer.
    refuses: how many are dropped before they are read. hangs_up: after each answer. is_silent: gives none.
    """

    def __init__(self):
        self.answer, self.metadata, self.status = ANSWER, {"server": "vlm-local", "model": "behind"}, 200
        self.asked, self.cuts, self.refuses = [], 0, 0
        self.drips = self.hangs_up = self.is_silent = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.asked.append(self.path)
                self._send(outer.metadata)

            def do_POST(self):
                if outer.refuses:
                    outer.refuses -= 1
                    self.close_connection = True
                    return
                self.rfile.read(int(self.headers["Content-Length"] or 0))
                outer.asked.append(self.path)
                if outer.cuts:
                    outer.cuts -= 1
                    self.connection.shutdown(2)
                    self.close_connection = True
                elif outer.drips:
                    self._drip()
                elif outer.is_silent:
                    until(lambda: not outer.is_silent)
                else:
                    self._send(outer.answer)

            def _send(self, value):
                body = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(outer.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                self.close_connection |= outer.hangs_up

            def _drip(self):
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                while outer.drips:
                    self.wfile.write(b" ")
                    time.sleep(0.02)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *args: None
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.drips = self.is_silent = False
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def behind():
    server = FakePolicyServer()
    yield server
    server.close()


@contextmanager
def serve_in_front(url, **settings):
    """`serve --model URL` -> its port."""
    policies = open_policies(PolicyOptions(model=url))
    server = HTTPServer(create_app(policies, ServerSettings(**settings)), bind("127.0.0.1", 0))
    try:
        yield server.port
    finally:
        server.service.drain(2)
        server.stop()


def act(port):
    status, headers, body = ask(port, "POST", "/act?details=1", build_body())
    return status, headers, json.loads(body)


UNUSABLE = [
    {"action": [float("nan")] * 7},
    {"action": [0.0] * 6},
    {"action": None},
]


@pytest.mark.parametrize("said", UNUSABLE)
def test_an_unusable_answer_is_a_held_fault(behind, said):
    with serve_in_front(behind.url) as port:
        assert act(port)[2]["phrase"] == "stop"
        behind.answer = ANSWER | said
        status, _, details = act(port)
        assert status == 200 and details["fault"] and details["action"] == [0.0] * 6 + [1.0]
        behind.answer = ANSWER
        assert act(port)[2]["fault"] is None
    behind.answer = ANSWER | said
    with serve_in_front(behind.url, on_fault="error") as port:
        status, _, details = act(port)
        assert status == 503 and "server" in details["error"]


def test_a_server_in_front_says_its_own_state_and_the_model_behind(behind):
    behind.metadata |= {"state": "loading", "on_fault": "error", "embodiment": "libero", "version": "0"}
    with serve_in_front(behind.url) as port:
        told = json.loads(ask(port, "GET", "/metadata")[2])
    names = ("model", "state", "on_fault", "embodiment")
    assert [told[name] for name in names] == ["behind", "healthy", "hold", "auto"] and told["version"] != "0"


def test_a_server_that_is_away_at_a_reset_is_reset_before_the_next_step(behind):
    with serve_in_front(behind.url) as port:
        act(port)
        behind.status = 500
        assert ask(port, "POST", "/reset", b'{"seed": 3}')[0] == 200  # AutoEval ends a job on anything else
        status, _, details = act(port)
        assert status == 200 and "/reset answered 500" in details["fault"]
        behind.status = 200
        assert act(port)[2]["fault"] is None
        assert behind.asked[-2:] == ["/reset", "/act?details=1"]
        act(port)
        assert behind.asked[-1] == "/act?details=1" and behind.asked[-2] != "/reset"
        behind.status = 500
    with serve_in_front_of_none(behind) as port:  # the first step starts an episode by itself
        status, _, details = act(port)
        assert status == 200 and details["fault"]


@contextmanager
def serve_in_front_of_none(behind):
    """As serve_in_front, for a server that goes away once it has said what it is."""
    behind.status = 200
    with serve_in_front(behind.url) as port:
        behind.status = 500
        yield port


@pytest.mark.parametrize("phrase", ["fly to the moon", 5, ["stop"], {}])
def test_an_action_beside_an_unknown_phrase_counts_alone(behind, phrase):
    with serve_in_front(behind.url) as port:
        behind.answer = ANSWER | {"phrase": phrase}
        status, _, details = act(port)
        assert status == 200 and details["phrase"] is None and details["fault"] is None
        assert details["extra"] == {"unknown_phrase": repr(phrase)}
        assert ask(port, "POST", "/act", build_body())[0] == 200


@pytest.mark.parametrize("body", [b"", b"[", b"null", b"[[[", b"[" * 100_000, b'{"action": {}}', b"\xff"])
def test_what_is_no_answer_at_all_is_a_held_fault(behind, body):
    with serve_in_front(behind.url) as port:
        behind.answer = body
        status, _, details = act(port)
        assert status == 200 and details["fault"]


def test_optional_values_that_cannot_be_read_are_left_out(behind):
    thirds = {axis: [0.2, 0.3, 0.5] for axis in AXES}
    behind.answer = ANSWER | {
        "probability": float("nan"),
        "margin": "much",
        "missing_mass": 7,
        "marginals": thirds | {"x": [1]},
        "timings_ms": {"engine": 2.0, "a\r\nX-Evil: 1": 3, "late": float("inf"), "odd": "1"},
        "extra": {"cut": ["x", "<script>"], "forwards": 2, "huge": 10**400, "deep": {"a": []}, "near_tie": True},
    }
    with serve_in_front(behind.url) as port:
        status, headers, details = act(port)
        assert status == 200 and details["phrase"] == "stop" and details["fault"] is None
        assert [details[name] for name in ("probability", "margin", "missing_mass", "marginals")] == [None] * 4
        assert details["extra"] == {"forwards": 2, "near_tie": True}
        assert "engine" in details["timings_ms"] and "X-Evil" not in str(headers)
        behind.answer = ANSWER | {"probability": 0.5, "margin": -0.1, "missing_mass": 0, "marginals": thirds}
        details = act(port)[2]
        assert (details["probability"], details["margin"], details["missing_mass"]) == (0.5, -0.1, 0.0)
        assert details["marginals"] == thirds


def test_metadata_that_is_no_json_does_not_break_ours(behind):
    behind.metadata = {"server": "vlm-local", "model": {"a": 1}, "loss": float("nan"), "sizes": [float("inf"), 1]}
    with serve_in_front(behind.url) as port:
        status, _, body = ask(port, "GET", "/metadata")
        assert status == 200 and json.loads(body)["sizes"] == [None, 1]
        assert act(port)[0] == 200


@pytest.mark.parametrize(
    ("status", "error"), [(400, RequestError), (401, EngineError), (403, EngineError), (404, EngineError)]
)
def test_only_a_refused_observation_is_the_robots_fault(behind, status, error):
    policy = RemotePolicy(behind.url)
    policy.act(Observation(IMAGE, "go"))
    behind.status = status
    with pytest.raises(error, match=str(status)):
        policy.act(Observation(IMAGE, "go"))


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_a_server_of_ours_stays_one_when_its_metadata_fail_once(behind, status):
    policy = RemotePolicy(behind.url)
    behind.status = status
    with pytest.raises(EngineError, match=f"/metadata answered {status}"):
        policy.act(Observation(IMAGE, "go"))
    behind.status = 200
    assert policy.act(Observation(IMAGE, "go")).phrase == "stop"
    assert behind.asked == ["/metadata", "/metadata", "/act?details=1"]


@pytest.mark.parametrize("status", [400, 404, 405, 410, 422, 501])
def test_a_server_that_does_not_know_our_metadata_is_a_foreign_one(behind, status):
    behind.status = status
    assert PolicyClient(behind.url).metadata == {}


@pytest.mark.parametrize("status", [204, 302])
def test_only_a_200_is_an_answer(behind, status):
    client = PolicyClient(behind.url)
    assert client.is_vlm_local
    behind.status = status
    with pytest.raises(PolicyError, match=f"answered {status}"):
        client.act(IMAGE, "go")


def test_an_answer_has_a_largest_size(behind):
    behind.metadata = b" " * (2**22 + 1)
    with pytest.raises(PolicyError, match="more than 4194304 bytes"):
        PolicyClient(behind.url).reset(3)


def test_an_observation_is_never_sent_twice(behind):
    policy = RemotePolicy(behind.url)
    policy.act(Observation(IMAGE, "go"))
    behind.cuts = 1
    with pytest.raises(EngineError, match="gave no answer"):
        policy.act(Observation(IMAGE, "go"))
    assert behind.asked.count("/act?details=1") == 2
    np.testing.assert_array_equal(policy.act(Observation(IMAGE, "go")).action, ANSWER["action"])
    behind.cuts = 1
    policy.reset(3)  # which changes nothing the second time
    assert behind.asked[-2:] == ["/reset", "/reset"]


def test_an_idle_connection_that_the_server_closed_is_opened_again(behind):
    behind.hangs_up = True
    client = PolicyClient(behind.url)
    assert client.metadata
    for _ in range(3):
        assert select.select([client._connection.sock], [], [], 60)[0]  # its end is here
        client.act(IMAGE, "go")
    assert behind.asked.count("/act?details=1") == 3


def test_an_observation_that_did_not_get_through_is_sent_again(behind):
    client = PolicyClient(behind.url)
    client.act(IMAGE, "go")
    behind.refuses = 1
    client.act(np.zeros((2000, 2000, 3), np.uint8), "go")  # more than the buffers of a connection take
    assert behind.asked.count("/act?details=1") == 2


def test_nothing_is_asked_again_when_its_time_is_over(behind):
    client = PolicyClient(behind.url, timeout_s=0.5)
    client.act(IMAGE, "go")
    behind.is_silent = True
    with pytest.raises(PolicyError, match="timed out"):
        client.reset(3)
    assert behind.asked.count("/reset") == 1


def test_an_answer_that_never_ends_runs_out_of_time(behind):
    policy = RemotePolicy(behind.url, timeout_s=1)
    policy.act(Observation(IMAGE, "go"))
    behind.drips = True
    with pytest.raises(EngineError, match="timed out"):
        policy.act(Observation(IMAGE, "go"))


QUESTION = Question(IMAGE, "is it open?", ("yes", "no"))


@pytest.mark.parametrize(
    ("said", "probabilities"),
    [
        ({}, None),
        ({"probabilities": {"yes": 0.7, "no": 0.2}, "missing_mass": 0.1}, {"yes": 0.7, "no": 0.2}),
        ({"probabilities": {"yes": 0.7}, "missing_mass": "much", "timings_ms": 3}, None),
        ({"probabilities": {"yes": 0.7, "no": "0.3"}, "timings_ms": {"a": "b"}}, None),
    ],
)
def test_the_optional_numbers_of_an_answer_may_be_missing(behind, said, probabilities):
    behind.answer = {"answer": "yes", **said}
    answer = ask_server(Detector(behind.url, QUESTION.choices), QUESTION)
    missing = 0.1 if probabilities else None
    assert (answer.choice, answer.probabilities, answer.missing_mass) == ("yes", probabilities, missing)


@pytest.mark.parametrize(("status", "kind"), [(413, RequestError), (500, EngineError), (302, EngineError)])
def test_a_question_that_is_refused_is_told_from_a_failure(behind, status, kind):
    behind.status, behind.answer = status, {"error": "no"}
    with pytest.raises(kind, match="no"):
        ask_server(Detector(behind.url, QUESTION.choices), QUESTION)


@pytest.mark.parametrize(
    "said", [{"answer": "maybe"}, {"answer": ["yes"]}, {"answer": "yes", "probability": float("nan")}]
)
def test_an_answer_that_is_none_is_an_error(behind, said):
    behind.answer = said
    with pytest.raises(EngineError, match="/answer gave"):
        ask_server(Detector(behind.url, QUESTION.choices), QUESTION)


def test_an_action_in_the_units_of_the_servers_robot_is_read_as_it_is_meant():
    with serve(settings=ServerSettings(embodiment="libero")) as server:
        server.engine.phrase = "move forward, close gripper"
        assert server.act()["action"] == [1, 0, 0, 0, 0, 0, 1]
        decision = RemotePolicy(server.url).act(Observation(IMAGE, "go"))
    np.testing.assert_allclose(decision.action, [0.0125, 0, 0, 0, 0, 0, 0], atol=1e-12)


@pytest.mark.parametrize("meant", [None, "0000000", [0.1] * 6, [0.1] * 6 + ["1"], [0.1] * 6 + [True]])
def test_what_is_meant_by_no_seven_numbers_moves_nothing(behind, meant):
    behind.answer = ANSWER | {"frame": "bridge", "meant": meant}
    np.testing.assert_array_equal(RemotePolicy(behind.url).act(Observation(IMAGE, "go")).action, ANSWER["action"])


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({"probability": 1.01}, {"probability": None}),
        ({"probability": 1.0000005}, {"probability": 1.0000005}),
        ({"marginals": {axis: [0.2, 0.3, 0.5] for axis in AXES[1:]}}, {"marginals": None}),
        ({"extra": {"cut": "x"}}, {"extra": {}}),  # a text, though each of its letters is a joint
        ({"extra": {"cut": ["x"], "gripper": "was opened"}}, {"extra": {"cut": ["x"], "gripper": "was opened"}}),
        ({"extra": {"list": [1, {}], "long": "x" * 301}}, {"extra": {}}),
    ],
)
def test_what_a_server_says_beside_its_action_counts_only_as_what_it_must_be(behind, said, read):
    behind.answer = ANSWER | said
    decision = RemotePolicy(behind.url).act(Observation(IMAGE, "go"))
    assert {name: getattr(decision, name) for name in read} == read


def test_two_clients_that_drive_one_robot_are_told_so():
    """Two evaluations by the same name at one server: each step of one would count in the episode of the other."""
    observation = Observation(IMAGE, "lift the cup")
    with serve() as server, contextlib.ExitStack() as stack:
        first, second, apart = (
            stack.enter_context(contextlib.closing(RemotePolicy(f"{server.url}/s/{name}")))
            for name in ("sim0", "sim0", "sim1")
        )
        for policy in (first, apart):
            policy.reset(1)
            policy.act(observation)
        second.reset(2)
        first.act(observation)  # step 0 again, as where the server begins an episode by itself
        with pytest.raises(EngineError, match=r"another client drives http.*/s/sim0 too: step 1 came instead of 0"):
            second.act(observation)
        with pytest.raises(EngineError, match="step 2 came instead of 1"):
            first.act(observation)
        apart.act(observation)
