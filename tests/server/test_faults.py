import json

import numpy as np
import pytest

from tests.serving import SteeredEngine, build_body, serve, until
from vlm_local.errors import EngineClosed, EngineError, RequestError
from vlm_local.policy import VLMPolicy
from vlm_local.safety import HoldOnFault
from vlm_local.server.service import ServerSettings
from vlm_local.types import Decision, Observation


class MoodyPolicy:
    """Raises or answers what stands next in `outcomes`."""

    def __init__(self, *outcomes):
        self.outcomes = list(outcomes)
        self.metadata = {}

    def reset(self, seed):
        pass

    def act(self, observation):
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return Decision(np.array([0.01] * 6 + [outcome]))


def _observe(gripper=1.0):
    return Observation(np.zeros((16, 16, 3), np.uint8), "go", gripper=gripper)


@pytest.mark.parametrize("gripper", [0.0, 1.0])
@pytest.mark.parametrize(
    ("error", "fault"), [(EngineError("out of memory"), "out of memory"), (ValueError("b"), "ValueError: b")]
)
def test_a_fault_leaves_the_gripper_under_its_command(error, fault, gripper):
    decision = HoldOnFault(MoodyPolicy(error), 5).act(_observe(gripper))
    np.testing.assert_array_equal(decision.action, [0, 0, 0, 0, 0, 0, gripper])
    assert decision.fault == fault and decision.phrase is None


def test_so_many_faults_in_a_row_are_held_and_no_more():
    faults = [EngineError("dead")] * 3
    moody = MoodyPolicy(*faults, *faults, 1.0, *faults)
    policy = HoldOnFault(moody, 2)
    for _ in range(2):
        assert policy.act(_observe()).fault
    with pytest.raises(EngineError, match="after 2 faults in a row"):
        policy.act(_observe())
    policy.reset(0)  # a new episode does not bring a dead model back to life
    with pytest.raises(EngineError):
        policy.act(_observe())
    moody.outcomes = [1.0, EngineError("again")]
    assert policy.act(_observe()).fault is None
    assert policy.act(_observe()).fault == "again"


@pytest.mark.parametrize("error", [RequestError("no proprio"), EngineClosed("stopping")])
def test_what_is_no_fault_of_the_model_is_not_held(error):
    with pytest.raises(type(error)):
        HoldOnFault(MoodyPolicy(error), 5).act(_observe())


def test_over_http_a_fault_is_an_array_for_the_robot_and_marked_in_the_details(caplog):
    caplog.set_level("INFO")
    with serve() as server:
        server.act()
        assert "phrase=" in caplog.text and "fault=" not in caplog.text
        server.engine.fault = RuntimeError("CUDA out of memory")
        status, _, body = server.post("/act", build_body())
        assert status == 200 and "__numpy__" in json.loads(body)
        details = server.act()
        assert details["action"] == [0, 0, 0, 0, 0, 0, 1] and "CUDA out of memory" in details["fault"]
        assert details["phrase"] is None and details["step"] == 2
        assert "fault='the model failed: RuntimeError: CUDA out of memory" in caplog.text
        for _ in range(3):
            server.act()
        status, _, body = server.post("/act", build_body())
        assert status == 503 and "after 5 faults in a row" in json.loads(body)["error"]
        assert b"Traceback" not in body
        server.engine.fault = None
        assert server.act()["fault"] is None
        until(lambda: len(server.records) == 8)
        assert [bool(getattr(r, "decision", None) and r.decision.fault) for r in server.records] == [
            False, True, True, True, True, True, False, False,
        ]  # fmt: skip


def test_for_evaluations_a_fault_is_an_error_at_once():
    with serve(settings=ServerSettings(on_fault="error")) as server:
        server.engine.fault = ValueError("no")
        status, _, body = server.post("/act", build_body())
        assert status == 503 and "ValueError: no" in json.loads(body)["error"]


def test_a_hanging_model_is_held_then_refused_and_comes_back():
    with serve(SteeredEngine(), deadline_ms=1000) as server:
        server.act()
        server.engine.gate.clear()
        assert "deadline" in server.act()["fault"]
        until(lambda: json.loads(server.get("/health")[2])["status"] == "stuck")
        assert "stuck" in server.act()["fault"]
        assert server.get("/health")[0] == 503
        server.engine.gate.set()
        until(lambda: server.get("/health")[0] == 200)
        assert server.act()["fault"] is None


def test_a_bug_in_the_policy_is_a_500_without_traceback_where_faults_are_errors(monkeypatch):
    def act(policy, observation):
        raise KeyError("bug")

    with serve(settings=ServerSettings(on_fault="error")) as server:
        server.act()
        monkeypatch.setattr(VLMPolicy, "act", act)
        status, _, body = server.post("/act", build_body())
        assert status == 500 and b"Traceback" not in body and "KeyError" in json.loads(body)["error"]
