"""An engine in a process of its own: the same answers, and what happens when either side ends."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest

from tests.serving import until
from tests.tiny_models import tiny_checkpoint
from vlm_local.assembly import PolicyOptions, open_engine
from vlm_local.engines.process import EngineProcess
from vlm_local.engines.scripted import ScriptedEngine
from vlm_local.engines.worker import EngineWorker
from vlm_local.errors import ConfigError, EngineError, RequestError
from vlm_local.types import GenerationRequest, Prompt

CHOICES = ("yes", "no", "perhaps")


class _Odd(ScriptedEngine):
    """Says its last choice; the question says what it does instead."""

    def __init__(self):
        super().__init__(lambda request: np.arange(len(request.sentences)), "odd")
        self.forgotten = []

    @property
    def metadata(self):
        return {**super().metadata, "pid": os.getpid(), "forgotten": list(self.forgotten)}

    def prepare(self, request):
        if request.prompt.after == "narrow":
            raise RequestError("the picture is too narrow", 422)
        if request.prompt.after == "odd":
            raise ValueError("an odd picture")
        return request

    def generate(self, requests):
        for request in requests:
            if request.prompt.after == "raise":
                raise ZeroDivisionError("nothing to divide by")
            if request.prompt.after == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if request.prompt.after == "hang":
                time.sleep(600)
        return super().generate(requests)

    def forget(self, episode):
        self.forgotten.append(episode)


def _refuse():
    raise ConfigError("no such model")


def _fail():
    raise MemoryError("no room")


def _ask(what="", episode="robot/0"):
    return GenerationRequest(np.zeros((8, 8, 3), np.uint8), Prompt("", what, "chat"), CHOICES, episode=episode)


@pytest.fixture
def engine():
    engine = EngineProcess(_Odd)
    yield engine
    engine.close()


def test_it_answers_from_elsewhere_and_tells_what_it_knows(engine):
    assert engine.metadata["pid"] != os.getpid() and engine.max_batch == _Odd.max_batch
    assert [each.sentence for each in engine.generate([_ask(), _ask()])] == ["perhaps", "perhaps"]
    engine.forget("robot/0")
    engine.generate([_ask()])
    assert engine.metadata["forgotten"] == ["robot/0"]


def test_a_model_answers_as_it_does_in_this_process():
    options = PolicyOptions(model=str(tiny_checkpoint("qwen2-vl")), device="cpu", dtype="float32")
    image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    requests = [
        GenerationRequest(image, Prompt("", text, "chat"), CHOICES, posterior="exact") for text in ("is it?", "or not?")
    ]
    apart, here = EngineProcess(partial(open_engine, options)), open_engine(options)
    try:
        answers = apart.generate(requests)
    finally:
        apart.close()
    expected = here.generate([here.prepare(request) for request in requests])
    for answer, other in zip(answers, expected, strict=True):
        assert answer.sentence == other.sentence
        np.testing.assert_array_equal(answer.probabilities, other.probabilities)
    assert apart.metadata == here.metadata


def test_what_cannot_be_prepared_spoils_no_other(engine):
    wrong, failed, right = engine.generate([_ask("narrow"), _ask("odd"), _ask()])
    assert isinstance(wrong, RequestError) and wrong.status == 422 and "narrow" in str(wrong)
    assert isinstance(failed, EngineError) and "an odd picture" in str(failed)
    assert right.sentence == "perhaps"
    assert isinstance(engine.generate([_ask("narrow")])[0], RequestError)


def test_what_the_model_raises_is_raised_here(engine):
    with pytest.raises(EngineError, match="ZeroDivisionError: nothing to divide by"):
        engine.generate([_ask("raise")])
    assert engine.generate([_ask()])[0].sentence == "perhaps"


def test_a_process_that_died_is_started_again(engine):
    first = engine.metadata["pid"]
    with pytest.raises(EngineError, match="ended with status -9"):
        engine.generate([_ask("die")])
    engine.forget("robot/0")
    assert engine.generate([_ask()])[0].sentence == "perhaps"
    os.kill(engine.metadata["pid"], signal.SIGKILL)  # between two requests
    until(lambda: engine._process.poll() is not None)
    assert engine.generate([_ask()])[0].sentence == "perhaps"
    assert engine.metadata["pid"] != first


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_that_hangs_is_started_again(stopped, caplog):
    engine = EngineProcess(_Odd, hung_after_s=0.5)
    try:
        first = engine.metadata["pid"]
        if stopped:  # it does not even read
            os.kill(first, signal.SIGSTOP)
        large = np.zeros((1024, 1024, 3), np.uint8)  # more than a pipe holds
        with pytest.raises(EngineError, match="status -9"):
            engine.generate([replace(_ask("hang"), image=large)])
        assert "has hung for 0.5 s" in caplog.text
        assert engine.generate([_ask()])[0].sentence == "perhaps"
        assert engine.metadata["pid"] != first
    finally:
        engine.close()


def test_only_the_request_that_kills_it_fails(engine):
    worker = EngineWorker(lambda: engine, deadline_ms=60_000)
    worker.wait_loaded(60)
    with pytest.raises(EngineError, match="status -9"):
        worker.generate(_ask("die"))
    assert worker.generate(_ask()).sentence == "perhaps"
    with pytest.raises(RequestError, match="too narrow"):
        worker.generate(_ask("narrow"))
    assert worker.close(10)


@pytest.mark.parametrize(
    ("load", "error", "told"), [(_refuse, ConfigError, "no such"), (_fail, EngineError, "no room")]
)
def test_a_load_that_fails_says_why(load, error, told):
    with pytest.raises(error, match=told):
        EngineProcess(load)


def test_signals_for_the_whole_group_leave_it_to_the_server(engine):
    for name in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.metadata["pid"], name)
    assert engine.generate([_ask()])[0].sentence == "perhaps"


def test_a_server_need_not_wait_for_a_model_that_hangs_to_end():
    code = (
        "import threading\n"
        "from tests.engines.test_process import EngineProcess, _Odd, _ask\n"
        "sent, engine = threading.Event(), EngineProcess(_Odd, hung_after_s=600)\n"
        "send = engine._send\n"
        "engine._send = lambda requests: (send(requests), sent.set())\n"
        "threading.Thread(target=engine.generate, args=([_ask('hang')],), daemon=True).start()\n"
        "sent.wait()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("busy", [False, True])
def test_it_ends_with_a_server_that_is_killed(busy):
    code = (
        "import threading\n"
        "from tests.engines.test_process import EngineProcess, _Odd, _ask\n"
        "engine = EngineProcess(_Odd)\n"
        "print(engine.metadata['pid'], flush=True)\n"
        f"engine.generate([_ask('hang')]) if {busy} else threading.Event().wait()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as server:
        pid = int(server.stdout.readline())
        assert psutil.pid_exists(pid)
        server.kill()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
