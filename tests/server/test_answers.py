"""Questions over a real socket, asked in bytes and by the client that stands in for AutoEval's detector."""

import http.client
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from tests.serving import Policies, ask, build_body
from vlm_local.answers import Answerer
from vlm_local.client import Detector, PolicyError, read_choices
from vlm_local.engines.scripted import ScriptedEngine
from vlm_local.prompts import load_template
from vlm_local.server.app import create_app
from vlm_local.server.routes import MAX_QUESTIONS
from vlm_local.server.serve import HTTPServer, bind
from vlm_local.server.service import ServerSettings
from vlm_local.wire import encode_array

DRAWER = "is the drawer open? answer yes or no"
SINK = "is the eggplant in the sink or in the basket? answer sink or basket or invalid"
BRIGHT = np.full((64, 48, 3), 200, np.uint8)
DARK = np.full((64, 48, 3), 50, np.uint8)


def judge(request):
    """The brighter the picture, the more is the first choice favoured."""
    share = request.image.mean() / 255
    return np.array([share, *[(1 - share) / (len(request.sentences) - 1)] * (len(request.sentences) - 1)])


@contextmanager
def serve_answers(gate=None):
    def weigh(request):
        if gate is not None:
            gate.wait(60)
        return judge(request)

    policies = Policies(ScriptedEngine(weigh, "bright"))
    policies.answerer = Answerer(policies.worker.generate, load_template("answer"))
    server = HTTPServer(create_app(policies, ServerSettings()), bind("127.0.0.1", 0))
    try:
        policies.worker.wait_loaded(60)
        yield server
    finally:
        policies.worker.close()
        server.service.drain(2)
        server.stop()


@pytest.fixture
def server():
    with serve_answers() as server:
        yield server


def build_question(image=BRIGHT, question=DRAWER, choices=("yes", "no")):
    return json.dumps({"image": encode_array(image), "question": question, "choices": list(choices)}).encode()


def test_an_answer_is_a_choice_with_the_probability_of_each(server):
    status, _, body = ask(server.port, "POST", "/answer", build_question())
    answer = json.loads(body)
    assert status == 200 and answer["answer"] == "yes" and answer["model"] == "bright"
    assert answer["probability"] == pytest.approx(200 / 255)
    assert answer["probabilities"] == pytest.approx({"yes": 200 / 255, "no": 55 / 255})
    assert ask(server.port, "POST", "/s/two/answer", build_question(DARK))[0] == 200


def test_a_bad_question_is_answered_400_and_the_server_lives(server):
    for body in (build_question(question="x" * 10_000), build_question(choices=["yes", "Yes"]), b"{", b""):
        status, _, answer = ask(server.port, "POST", "/answer", body)
        assert status == 400 and json.loads(answer)["error"]
    assert ask(server.port, "GET", "/answer")[0] == 405
    assert ask(server.port, "POST", "/answer", build_question())[0] == 200


def test_questions_do_not_crowd_out_the_robots():
    gate = threading.Event()
    with serve_answers(gate) as server:
        connections = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(MAX_QUESTIONS)]
        for connection in connections:
            connection.request("POST", "/answer", build_question())
        statuses = set()
        while 503 not in statuses:  # until those above are inside
            statuses.add(ask(server.port, "POST", "/answer", build_question(choices=["a"]))[0])
        gate.set()
        assert [connection.getresponse().status for connection in connections] == [200] * MAX_QUESTIONS
        assert ask(server.port, "POST", "/act", build_body())[0] == 200
        assert statuses <= {400, 503}


@pytest.mark.parametrize(
    "image",
    [
        *(BRIGHT, Image.fromarray(BRIGHT), Image.fromarray(BRIGHT).convert("RGBA")),
        *(BRIGHT / np.float32(255), (BRIGHT - 0.4) / np.float32(255)),
    ],
)
def test_the_detector_answers_as_autoeval_asks(server, image):
    detector = Detector(f"http://127.0.0.1:{server.port}")
    assert detector(DRAWER, image) == "yes"
    assert detector(DRAWER, image, answer="yes") is True
    assert detector(DRAWER, image, answer="no") is False
    assert detector(SINK, image, answer="sink") is True
    assert detector.last["probabilities"]["sink"] == pytest.approx(200 / 255)


def test_the_detector_can_ask_for_certainty(server):
    detector = Detector(f"http://127.0.0.1:{server.port}", threshold=0.9)
    assert detector(DRAWER, BRIGHT, answer="yes") is False
    assert detector(DRAWER, np.full_like(BRIGHT, 250), answer="yes") is True
    certain = Detector(f"http://127.0.0.1:{server.port}", threshold=1.0)
    assert certain(DRAWER, np.full_like(BRIGHT, 255), answer="yes") is True


def test_the_detector_keeps_pictures_and_results(server, tmp_path):
    detector = Detector(f"http://127.0.0.1:{server.port}", save_data=True, save_dir=str(tmp_path / "log"))
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    detector(DRAWER, image, answer="yes")
    detector(DRAWER, DARK)
    assert (np.asarray(Image.open(tmp_path / "log/0_img.png")) == image).all()
    assert (tmp_path / "log/1_success.txt").read_text() == "no"
    Detector(f"http://127.0.0.1:{server.port}", save_dir=str(tmp_path / "none"))(DRAWER, image)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="needs a save_dir"):
        Detector(f"http://127.0.0.1:{server.port}", save_data=True)


def test_a_question_is_asked_again_while_the_server_is_away(server, monkeypatch):
    detector = Detector(f"http://127.0.0.1:{server.port}")
    assert detector(DRAWER, BRIGHT) == "yes"
    pauses = []
    monkeypatch.setattr("vlm_local.client.time.sleep", pauses.append)
    away = Detector("http://127.0.0.1:9")
    with pytest.raises(PolicyError, match="is the server running"):
        away(DRAWER, BRIGHT)
    assert len(pauses) == Detector.TRIES - 1
    with pytest.raises(PolicyError, match="answered 400"):
        detector(DRAWER, BRIGHT[:4])  # too small, and not away
    assert len(pauses) == Detector.TRIES - 1


def test_a_question_the_detector_cannot_ask_is_refused(server):
    detector = Detector(f"http://127.0.0.1:{server.port}")
    with pytest.raises(ValueError, match="none of the choices"):
        detector(DRAWER, BRIGHT, answer="open")
    for image in (BRIGHT[..., 0], BRIGHT[..., :2], BRIGHT / 10, BRIGHT / -255, BRIGHT.astype(int)):
        with pytest.raises(ValueError, match="RGB image"):
            detector(DRAWER, image)
    for question in ("is the drawer open?", "is it open? answer yes", "is it open? answer yes or "):
        with pytest.raises(ValueError, match="does not end in its choices"):
            detector(question, BRIGHT)
    assert read_choices(SINK) == ["sink", "basket", "invalid"]
    assert read_choices("is the answer right? answer yes or no.") == ["yes", "no"]
