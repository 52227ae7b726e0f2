"""An engine in a process of its own: the same answers, and what happens when either side ends."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe

import numpy as np
import psutil
import pytest

from tests.engines.odd_engine import CHOICES, OddEngine, ask, fail, load_and_tell, refuse
from tests.serving import serve, until
from tests.tiny_models import tiny_checkpoint
from vlm_local.engines.process import EngineProcess
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import ConfigError, EngineError, RequestError
from vlm_local.policy_options import PolicyOptions
from vlm_local.resolved_options import open_engine
from vlm_local.types import GenerationRequest, Picture, Prompt, Thought, ThoughtRequest


@pytest.fixture(scope="module")
def engine():
    """One for all tests that leave a working one behind."""
    engine = EngineProcess(OddEngine, hung_after_s=600, stopped_after_s=600)
    yield engine
    engine.close()


def test_it_answers_from_elsewhere_and_tells_what_it_knows(engine):
    assert engine.metadata["pid"] != os.getpid() and engine.max_batch == OddEngine.max_batch
    assert [each.sentence for each in engine.generate([ask(), ask()])] == ["perhaps", "perhaps"]
    engine.forget("robot/0")
    engine.generate([ask()])
    assert engine.metadata["forgotten"] == ["robot/0"]


def test_it_does_not_hear_ctrl_c_not_even_before_its_first_line(engine):
    with open(f"/proc/{engine.metadata['pid']}/status") as file:
        blocked = next(int(line.split()[1], 16) for line in file if line.startswith("SigBlk"))
    assert blocked >> (signal.SIGINT - 1) & 1


def test_a_thought_crosses_the_pipe_piece_by_piece_beside_steps(engine):
    for value in (0, 1):
        picture = Picture(np.full((2, 2, 3), value, np.uint8))
        prompt = replace(ask("why").prompt, earlier=(picture,))
        request = ThoughtRequest(ask().image, prompt, "robot/0", (("TASK", 9),), 9)
        assert engine.think("robot/0", request) == "look"
        assert engine.generate([replace(ask(), prompt=prompt)])[0].sentence == "perhaps"
        assert engine.think("robot/0") == Thought(f"TASK: why [{12 * value}]", 2)
    engine.think("robot/0", ThoughtRequest(ask().image, ask("raise").prompt, "robot/0", (), 9))
    with pytest.raises(EngineError, match="nothing to divide by"):
        engine.think("robot/0")
    assert engine.generate([ask()])[0].sentence == "perhaps"


@pytest.mark.slow
def test_a_model_answers_as_it_does_in_this_process():
    options = PolicyOptions(model=str(tiny_checkpoint("qwen2-vl")), device="cpu", dtype="float32")
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    seen = Picture(255 - image)  # sent once
    requests = [
        GenerationRequest(image, Prompt("", text, earlier), CHOICES, posterior="exact")
        for text, earlier in (("is it?", ()), ("or not?", ("before", seen, "now")), ("or is it?", (seen, "now")))
    ]
    apart, here = EngineProcess(partial(open_engine, options)), open_engine(options)
    try:
        answers = apart.generate(requests)
    finally:
        apart.close()
    expected = here.generate(requests)
    for answer, other in zip(answers, expected, strict=True):
        assert answer.sentence == other.sentence
        np.testing.assert_array_equal(answer.probabilities, other.probabilities)
    assert apart.metadata == here.metadata


def test_what_cannot_be_prepared_spoils_no_other(engine):
    wrong, failed, right = engine.generate([ask("narrow"), ask("odd"), ask()])
    assert isinstance(wrong, RequestError) and wrong.status == 422 and "narrow" in str(wrong)
    assert isinstance(failed, EngineError) and "an odd picture" in str(failed)
    assert right.sentence == "perhaps"
    assert isinstance(engine.generate([ask("narrow")])[0], RequestError)


def test_what_the_model_raises_is_raised_here(engine):
    with pytest.raises(EngineError, match="ZeroDivisionError: nothing to divide by"):
        engine.generate([ask("raise")])
    assert engine.generate([ask()])[0].sentence == "perhaps"


def test_a_slow_forward_is_none_that_hangs(engine):
    first = engine.metadata["pid"]
    assert engine.generate([ask("slow")])[0].sentence == "perhaps"  # looked at meanwhile
    assert engine.metadata["pid"] == first


def test_a_process_that_died_is_started_again(engine):
    first = engine.metadata["pid"]
    seen = replace(ask(), prompt=replace(ask().prompt, earlier=(Picture(np.zeros((8, 8, 3), np.uint8)),)))
    assert engine.generate([seen])[0].sentence == "perhaps"
    with pytest.raises(EngineError, match="ended with status -9"):
        engine.generate([ask("die")])
    engine.forget("robot/0")
    assert engine.generate([seen])[0].sentence == "perhaps"  # a picture that the new one has not seen
    second = engine.metadata["pid"]
    os.kill(second, signal.SIGKILL)  # between two requests
    until(lambda: engine.is_down or engine.metadata["pid"] != second)
    assert engine.generate([ask()])[0].sentence == "perhaps"
    assert len({first, second, engine.metadata["pid"]}) == 3


def _has_ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_that_hangs_is_started_again(stopped, caplog):
    engine = EngineProcess(OddEngine, hung_after_s=0.5)
    try:
        first = engine.metadata["pid"]
        if stopped:  # it does not even read
            os.kill(first, signal.SIGSTOP)
        large = np.zeros((1024, 1024, 3), np.uint8)  # more than a pipe holds
        with pytest.raises(EngineError, match="status -9"):
            engine.generate([replace(ask("hang"), image=large)])
        assert "has hung for 0.5 s" in caplog.text
        assert engine.generate([ask()])[0].sentence == "perhaps"
        assert engine.metadata["pid"] != first
    finally:
        engine.close()
    with pytest.raises(EngineError, match="the engine is closed"):  # and no third process
        engine.generate([ask()])


@contextmanager
def _serve(load=OddEngine, deadline_ms=60_000, **limits):
    """A server with such an engine, and a question for its health."""
    with serve(lambda: EngineProcess(load, **limits), deadline_ms=deadline_ms) as server:
        worker = server.service.policies.worker
        worker.wait_loaded(60)

        def look():
            status, _, body = server.get("/health")
            return status, json.loads(body)["status"]

        yield server, worker, look


def test_health_tells_of_a_process_that_is_stopped_while_nobody_asks():
    with _serve(stopped_after_s=600) as (_, worker, look):
        assert look() == (200, "healthy")
        first = worker.metadata["pid"]
        os.kill(first, signal.SIGSTOP)
        until(lambda: look() == (503, "stuck"))
        os.kill(first, signal.SIGCONT)
        until(lambda: look() == (200, "healthy"))
        assert worker.metadata["pid"] == first


def test_a_stopped_process_is_replaced_while_nobody_asks():
    with _serve(stopped_after_s=0.5) as (server, worker, look):
        first = worker.metadata["pid"]
        os.kill(first, signal.SIGSTOP)
        until(lambda: worker.metadata["pid"] != first)
        until(lambda: look() == (200, "healthy"))
        assert _has_ended(first) and server.act()["fault"] is None


def test_a_process_that_dies_is_replaced_while_nobody_asks():
    with _serve() as (server, worker, look):
        first = worker.metadata["pid"]
        os.kill(first, signal.SIGKILL)
        until(lambda: worker.metadata["pid"] != first)
        until(lambda: look() == (200, "healthy"))
        assert server.act()["fault"] is None


def test_a_process_that_is_stopped_while_it_loads_again_is_replaced_too(tmp_path):
    pids = tmp_path / "pids"
    with _serve(load=partial(load_and_tell, str(pids)), stopped_after_s=0.5) as (server, _, look):
        first = int(pids.read_text())
        os.kill(first, signal.SIGKILL)
        until(lambda: pids.read_text() not in ("", str(first)))  # the next one begins to load
        second = int(pids.read_text())
        os.kill(second, signal.SIGSTOP)
        until(lambda: look() == (200, "healthy"))
        assert _has_ended(second) and server.act()["fault"] is None


def test_a_full_pipe_holds_nobody_for_ever():
    with _serve(stopped_after_s=2) as (server, worker, look):
        first = worker.metadata["pid"]
        os.kill(first, signal.SIGSTOP)
        for number in range(8):
            worker.forget(f"robot/{number}" + "x" * 100_000)  # more than a pipe holds
        until(lambda: look() == (503, "stuck"))
        until(lambda: worker.metadata["pid"] != first)
        until(lambda: look() == (200, "healthy"))
        assert server.act()["fault"] is None


def test_a_stopped_process_is_no_reason_to_wait_at_the_end():
    with _serve() as (_, worker, _):
        os.kill(worker.metadata["pid"], signal.SIGSTOP)
        assert worker.close(30)


def test_the_end_waits_for_no_forward_and_no_load(tmp_path):
    with _serve(deadline_ms=300) as (_, worker, _):
        with pytest.raises(EngineError, match="within the deadline"):
            worker.generate(ask("hang"))
        assert worker.close(30)
    pids = tmp_path / "pids"
    with _serve(load=partial(load_and_tell, str(pids), 600)) as (_, worker, _):
        first = int(pids.read_text())
        os.kill(first, signal.SIGKILL)
        until(lambda: pids.read_text() not in ("", str(first)))
        assert worker.close(30)


def test_only_the_request_that_kills_it_fails():
    worker = EngineWorker(lambda: EngineProcess(OddEngine), deadline_ms=60_000)
    worker.wait_loaded(60)
    with pytest.raises(EngineError, match="status -9"):
        worker.generate(ask("die"))
    assert worker.generate(ask()).sentence == "perhaps"
    with pytest.raises(RequestError, match="too narrow"):
        worker.generate(ask("narrow"))
    assert worker.close(10)


@pytest.mark.parametrize(("load", "error", "told"), [(refuse, ConfigError, "no such"), (fail, EngineError, "no room")])
def test_a_load_that_fails_says_why(load, error, told):
    with pytest.raises(error, match=told):
        EngineProcess(load)


def test_signals_for_the_whole_group_leave_it_to_the_server(engine):
    for name in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.metadata["pid"], name)
    assert engine.generate([ask()])[0].sentence == "perhaps"


def test_a_server_need_not_wait_for_a_model_that_hangs_to_end():
    code = (
        "import threading\n"
        "from tests.engines.odd_engine import OddEngine, ask\n"
        "from vlm_local.engines.process import EngineProcess\n"
        "sent, engine = threading.Event(), EngineProcess(OddEngine, hung_after_s=600)\n"
        "send = engine._send\n"
        "engine._send = lambda requests: (send(requests), sent.set())\n"
        "threading.Thread(target=engine.generate, args=([ask('hang')],), daemon=True).start()\n"
        "sent.wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_with_a_server_that_is_killed(busy):
    code = (
        "import threading\n"
        "from tests.engines.odd_engine import OddEngine, ask\n"
        "from vlm_local.engines.process import EngineProcess\n"
        "engine = EngineProcess(OddEngine)\n"
        "print(engine.metadata['pid'], flush=True)\n"
        f"engine.generate([ask('hang')]) if {busy} else threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        pid = int(server.stdout.readline())
        assert psutil.pid_exists(pid)
        server.kill()
    until(lambda: _has_ended(pid))


def test_a_server_that_ends_before_it_asks_leaves_no_traceback():
    """As `serve` does that cannot record: its last line says why, not the engine's."""
    ours, theirs = Pipe()
    with theirs:
        command = [sys.executable, "-m", "vlm_local.engines.process", str(theirs.fileno())]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, pass_fds=[theirs.fileno()], text=True)
    ours.close()
    assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
