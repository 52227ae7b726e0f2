"""A person corrects what a detector said, on the live page or over AutoEval's own log, and training reads it."""

import json
import resource
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.server.observing import observe
from tests.server.test_answers import DRAWER, SINK, build_question, judge
from tests.serving import ask
from vlm_local.cli import main
from vlm_local.data.corrections import LABELS
from vlm_local.data.questions import open_labelled
from vlm_local.engines.scripted import ScriptedEngine
from vlm_local.errors import DataError
from vlm_local.server.asked import FOLDER, KEPT
from vlm_local.server.viewer import create_viewer


def picture(seed):
    return np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)


@pytest.fixture
def server(tmp_path):
    with observe(tmp_path / "run", engine=ScriptedEngine(judge, "bright")) as server:
        yield server


def correction(port, name, answer, kind="application/json"):
    return port, "POST", f"/live/answers/{name}", json.dumps({"answer": answer}).encode(), {"Content-Type": kind}


def correct(*said):
    return ask(*correction(*said))[0]


def read(folder, **options):
    problems = []
    return {each.answer: each.image for each in open_labelled(folder, **options).open_images(problems.append)}, problems


def test_a_correction_on_the_live_page_is_a_labelled_picture(server, tmp_path):
    for seed in range(2):
        assert ask(server.port, "POST", "/answer", build_question(picture(seed)))[0] == 200
    listed = json.loads(ask(server.port, "GET", "/live/answers")[2])
    newest, oldest = listed["questions"]
    assert newest["question"] == DRAWER and newest["choices"] == ["yes", "no"] and newest["label"] is None
    assert " % sure" in newest["said"] and not (tmp_path / "run" / FOLDER).exists()
    assert correct(server.port, newest["id"], "no") == 200
    assert correct(server.port, oldest["id"], "no") == correct(server.port, oldest["id"], "yes") == 200  # a slip
    images, problems = read(tmp_path / "run" / FOLDER)
    assert not problems and (images["no"] == picture(1)).all() and (images["yes"] == picture(0)).all()
    assert len(list((tmp_path / "run" / FOLDER).glob("*.png"))) == 2
    labels = [each["label"] for each in json.loads(ask(server.port, "GET", "/live/answers")[2])["questions"]]
    assert labels == ["no", "yes"]


def test_what_is_no_answer_and_what_is_long_gone_is_refused(server):
    for seed in range(KEPT + 1):
        assert ask(server.port, "POST", "/answer", build_question(picture(seed)))[0] == 200
    assert correct(server.port, "0", "yes") == ask(server.port, "GET", "/live/answers/0")[0] == 404
    assert correct(server.port, "1", "perhaps") == correct(server.port, "1", ["yes"]) == 400
    assert correct(server.port, "1", "yes", "text/plain") == 415
    assert ask(server.port, "POST", "/live/answers/1", b"[]", {"Content-Type": "application/json"})[0] == 400


def test_pictures_that_take_much_memory_are_kept_less_long(server, monkeypatch):
    monkeypatch.setattr("vlm_local.server.asked.MAX_BYTES", 2 * picture(0).nbytes)
    for seed in range(3):
        ask(server.port, "POST", "/answer", build_question(picture(seed)))
    assert [each["id"] for each in json.loads(ask(server.port, "GET", "/live/answers")[2])["questions"]] == ["2", "1"]


def test_a_correction_that_does_not_fit_leaves_nothing_and_is_taken_when_there_is_room(server, tmp_path):
    folder = tmp_path / "run" / FOLDER
    for seed in range(2):
        ask(server.port, "POST", "/answer", build_question(picture(seed)))
    assert correct(server.port, "0", "yes") == 200
    kept = (folder / LABELS).read_bytes()
    for room, name in ((64, "1"), (len(kept) + 20, "0")):  # for no picture, and for a part of a line
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            status, _, told = ask(*correction(server.port, name, "no"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert status == 507 and str(folder).encode() in told
        assert (folder / LABELS).read_bytes() == kept and len(list(folder.iterdir())) == 2
    assert correct(server.port, "1", "no") == 200
    images, problems = read(folder)
    assert not problems and (images["no"] == picture(1)).all()


def test_corrections_go_on_where_the_run_was_removed(server, tmp_path):
    ask(server.port, "POST", "/answer", build_question(picture(0)))
    assert correct(server.port, "0", "yes") == 200
    shutil.rmtree(tmp_path / "run")
    assert correct(server.port, "0", "no") == 200
    images, problems = read(tmp_path / "run" / FOLDER)
    assert not problems and (images["no"] == picture(0)).all()


def test_without_a_recording_there_is_no_place_for_a_correction():
    with observe(engine=ScriptedEngine(judge, "bright")) as server:
        ask(server.port, "POST", "/answer", build_question())
        assert correct(server.port, "0", "yes") == 409


def test_questions_of_two_kinds_are_read_one_at_a_time(server, tmp_path):
    ask(server.port, "POST", "/answer", build_question(picture(0)))
    ask(server.port, "POST", "/answer", build_question(picture(1), SINK, ("sink", "basket", "invalid")))
    assert correct(server.port, "0", "yes") == correct(server.port, "1", "invalid") == 200
    with pytest.raises(DataError, match="name one of them with --question"):
        open_labelled(tmp_path / "run" / FOLDER)
    assert open_labelled(tmp_path / "run" / FOLDER, question=SINK).choices == ("sink", "basket", "invalid")


@pytest.fixture
def log(tmp_path):
    folder = tmp_path / "job_open_web_client_open_the_drawer_20260101"
    folder.mkdir()
    for number in (0, 2, 10):
        Image.fromarray(picture(number)).save(folder / f"{number}_img.png")
        (folder / f"{number}_success.txt").write_text(str(number == 2))
    return folder


def test_autoevals_log_is_labelled_by_a_person_and_not_by_its_verdicts(log):
    with pytest.raises(DataError, match="nobody has labelled"):
        open_labelled(log)
    client = create_viewer([], [log]).test_client()
    listed = client.get("/live/answers").get_json()["questions"]
    assert [each["id"] for each in listed] == ["0.0_img.png", "0.2_img.png", "0.10_img.png"]
    assert [each["said"][-5:].strip() for each in listed] == ["False", "True", "False"]
    assert client.get("/live/answers/0.2_img.png").data == (log / "2_img.png").read_bytes()
    for name, answer in (("0.0_img.png", "no"), ("0.10_img.png", "yes")):
        assert client.post(f"/live/answers/{name}", json={"answer": answer}).status_code == 200
    for name in ("0.3_img.png", "1.0_img.png", "0.labels.jsonl", "0.", ".0_img.png", "\xb2.0_img.png"):
        assert client.post(f"/live/answers/{name}", json={"answer": "yes"}).status_code == 404
        assert client.get(f"/live/answers/{name}").status_code == 404
    images, problems = read(log)
    assert not problems and (images["no"] == picture(0)).all() and (images["yes"] == picture(10)).all()
    assert open_labelled(log).question == DRAWER


def test_labels_that_are_none_are_told_and_left_out(log):
    good = {"picture": "0_img.png", "question": DRAWER, "choices": ["yes", "no"], "answer": "no"}
    bad = ({**good, "picture": "../0_img.png"}, {**good, "answer": "maybe"}, {**good, "choices": "yes"}, [1], {})
    missing = {**good, "picture": "7_img.png"}
    (log / "labels.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in (good, *bad, missing)) + "{")
    images, problems = read(log)
    assert list(images) == ["no"] and len(problems) == len(bad) + 2


def test_view_tells_what_it_cannot_label(tmp_path, capsys):
    folder = tmp_path / "logs" / "something_else"
    folder.mkdir(parents=True)
    Image.fromarray(picture(0)).save(folder / "0_img.png")
    assert main(["view", str(tmp_path / "logs"), "--port", "0"]) == 2
    assert "names none of AutoEval's tasks" in capsys.readouterr().err
