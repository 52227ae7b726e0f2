"""Scores of a success detector by hand-worked numbers, and the whole command on pictures in files."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vlm_local.answers import Answer
from vlm_local.cli import main
from vlm_local.cli.answers import format_report
from vlm_local.data.questions import TASKS, open_labelled
from vlm_local.errors import ConfigError, DataError, EngineError
from vlm_local.lab.detector.run import evaluate_detector
from vlm_local.lab.detector.scores import find_threshold, score_answers

CHOICES = ("yes", "no")


def row(label, answer, yes):
    return {"label": label, "answer": answer, "probabilities": {"yes": yes, "no": 1 - yes}}


ROWS = [
    row("yes", "yes", 0.9),
    row("yes", "yes", 0.6),
    row("yes", "no", 0.4),
    row("no", "yes", 0.7),
    row("no", "no", 0.1),
]


def test_scores_are_those_worked_out_by_hand():
    report = score_answers(ROWS, CHOICES, 0.9)
    assert report["accuracy"] == 0.6 and report["majority"] == {"answer": "yes", "accuracy": 0.6}
    assert report["confusion"] == [[2, 1, 0], [1, 1, 0]]
    yes = report["by_answer"]["yes"]
    assert yes["recall"] == pytest.approx(2 / 3) and yes["precision"] == pytest.approx(2 / 3)
    assert yes["auc"] == pytest.approx(4 / 6)  # of the pairs, 0.6 and 0.4 stand below 0.7
    assert yes["at_precision"]["threshold"] == 0.9 and yes["at_precision"]["kept"] == 1
    assert report["calibration"]["brier"] == pytest.approx(2 * (0.01 + 0.16 + 0.36 + 0.49 + 0.01) / 5)
    assert report["calibration"]["ece"] == pytest.approx((0.1 + 0.7 + abs(1.2 - 1) + 0.1) / 5)


def test_a_failure_is_a_wrong_answer():
    failed = {"label": "yes", "answer": None, "probabilities": None}
    report = score_answers([*ROWS, failed], CHOICES, 0.9)
    assert report["accuracy"] == 0.5 and report["failed"] == 1 and report["confusion"][0] == [2, 1, 1]


def test_without_probabilities_there_is_accuracy_and_nothing_else():
    report = score_answers([{**each, "probabilities": None} for each in ROWS], CHOICES, 0.9)
    assert report["accuracy"] == 0.6 and report["calibration"] is None
    assert report["by_answer"]["yes"]["auc"] is None and report["by_answer"]["yes"]["at_precision"] is None


def test_a_threshold_never_cuts_through_equal_scores():
    found = find_threshold(np.array([0.9, 0.8, 0.8, 0.8]), np.array([True, True, True, False]), 0.9)
    assert (found["threshold"], found["kept"]) == (0.9, 1)
    assert find_threshold(np.array([0.9]), np.array([False]), 0.9) is None


def test_a_share_of_few_pictures_has_no_interval():
    assert score_answers(ROWS, CHOICES, 0.9)["interval"] is None
    assert score_answers(10 * ROWS, CHOICES, 0.9)["interval"] == pytest.approx([0.4618, 0.7239], abs=1e-4)


# --- pictures in files ----------------------------------------------------------------------------


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)


def write_record(path, images):
    steps = [{"observation": {"image_primary": image, "proprio": np.zeros(8)}} for image in images]
    path.write_bytes(pickle.dumps(steps))


def write_classes(folder, **classes):
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(picture(index)).save(folder / name / f"{index}.png")
    return folder


def read(folder):
    problems = []
    images = list(open_labelled(folder).open_images(problems.append))
    return images, problems


@pytest.mark.parametrize(
    "names", [("record-open-drawer-1", "record-close-drawer"), ("record-open_drawer", "record-close_drawer")]
)
def test_autoevals_files_are_known_by_their_names(tmp_path, names):
    write_record(tmp_path / f"{names[0]}.pkl", [picture(0), picture(1)])
    write_record(tmp_path / f"{names[1]}.pkl", [picture(2)[None]])  # a history of one frame
    labelled = open_labelled(tmp_path)
    assert labelled.question == TASKS[0].question and labelled.choices == ("yes", "no")
    images, problems = read(tmp_path)
    assert sorted(each.answer for each in images) == ["no", "yes", "yes"] and not problems
    assert (next(each for each in images if each.answer == "no").image == picture(2)).all()


def test_filtered_pictures_as_floats_are_read(tmp_path):
    write_record(tmp_path / "record-in-sink.pkl", [picture(0) / np.float32(255)])
    write_record(tmp_path / "record-invalid.pkl", [picture(1)])
    images, problems = read(tmp_path)
    assert not problems and (images[0].image == picture(0)).all()


@pytest.mark.parametrize("is_bgr", [False, True])
def test_what_filter_images_wrote_is_yes_and_no_to_a_question_of_the_user(is_bgr, tmp_path, capsys):
    """As floats; before 2026-01-29 blue came first."""
    for name, seed in (("positives", 0), ("negatives", 1)):
        pixels = picture(seed)[..., ::-1] if is_bgr else picture(seed)
        write_record(tmp_path / f"{name}.pkl", [pixels / np.float32(255)])
    labelled = open_labelled(tmp_path, is_bgr)
    problems = []
    images = {each.answer: each.image for each in labelled.open_images(problems.append)}
    assert (images["yes"] == picture(0)).all() and (images["no"] == picture(1)).all() and not problems
    assert labelled.question is None and labelled.choices == ("yes", "no")
    assert main(["eval-answers", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "--question" in capsys.readouterr().err


def test_filtered_pictures_beside_records_answer_their_question(tmp_path):
    write_record(tmp_path / "record-open-drawer.pkl", [picture(0)])
    write_record(tmp_path / "negatives.pkl", [picture(1) / np.float32(255)])
    images, problems = read(tmp_path)
    assert [each.answer for each in images] == ["yes", "no"] and not problems
    recorded, filtered = open_labelled(tmp_path, is_bgr=True).open_images(problems.append)  # of the filtered alone
    assert (recorded.image == picture(0)).all() and (filtered.image == picture(1)[..., ::-1]).all()
    assert open_labelled(tmp_path).question == TASKS[0].question
    (tmp_path / "record-open-drawer.pkl").rename(tmp_path / "record-in-sink.pkl")
    with pytest.raises(DataError, match="it after the answer, such as record-in-sink-2"):
        open_labelled(tmp_path)


def test_frames_of_a_recording_are_of_one_episode_until_it_is_done(tmp_path):
    steps = [{"observation": {"image_primary": picture()}, "done": done} for done in (False, True, False)]
    (tmp_path / "record-open-drawer.pkl").write_bytes(pickle.dumps(steps))
    write_record(tmp_path / "negatives.pkl", [picture(1) / np.float32(255)] * 2)
    images, _ = read(tmp_path)
    assert [each.episode for each in images] == [
        *["record-open-drawer.pkl, episode 0"] * 2,
        "record-open-drawer.pkl, episode 1",
        *("negatives.pkl, step 0", "negatives.pkl, step 1"),
    ]


def test_a_folder_for_each_answer_is_read(tmp_path):
    images, problems = read(write_classes(tmp_path, open=2, closed=1))
    assert [each.answer for each in images] == ["closed", "open", "open"] and not problems


def test_what_cannot_be_read_is_told_and_left_out(tmp_path):
    write_classes(tmp_path, open=2, closed=1)
    (tmp_path / "open" / "0.png").write_bytes(b"no picture")
    images, problems = read(tmp_path)
    assert len(images) == 2 and "0.png" in str(problems[0])


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    (tmp_path / "record-open-drawer.pkl").write_bytes(pickle.dumps([Bomb()]))
    write_record(tmp_path / "record-close-drawer.pkl", [picture()])
    images, problems = read(tmp_path)
    assert len(images) == 1 and "builtins.print" in str(problems[0]) and "boom" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [[{"observation": {}}], [3], [{"observation": {"image_primary": np.zeros((4, 4))}}]]
)
def test_steps_of_another_shape_are_told(tmp_path, content):
    (tmp_path / "record-open-drawer.pkl").write_bytes(pickle.dumps(content))
    assert len(read(tmp_path)[1]) == 1


def test_folders_with_nothing_to_tell_apart_are_refused(tmp_path):
    with pytest.raises(DataError, match="record-open-drawer"):
        open_labelled(write_classes(tmp_path / "one", open=2))
    with pytest.raises(DataError, match="no folder"):
        open_labelled(tmp_path / "away")
    for name in ("record-open-drawer", "record-in-sink"):
        write_record(tmp_path / f"{name}.pkl", [picture()])
    with pytest.raises(DataError, match="several tasks"):
        open_labelled(tmp_path)


# --- a whole evaluation ---------------------------------------------------------------------------


ABOUT = {"policy": {"name": "scripted"}, "data": "pictures", "question": "is it open?"}


def evaluate(folder, out, ask, **changes):
    labelled = open_labelled(folder)
    images = labelled.open_images(lambda error: None)
    return evaluate_detector(images, labelled.choices, ask, out, 0.9, ABOUT | changes, [])


def test_rows_scores_and_report_are_written(tmp_path):
    out = tmp_path / "out"
    told = {"closed": 0.3, "open": 0.7}
    report = evaluate(
        write_classes(tmp_path / "in", open=2, closed=1), out, lambda image: Answer("open", told, 0.0, {})
    )
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert [each["label"] for each in rows] == ["closed", "open", "open"] and rows[0]["probabilities"] == told
    assert report["accuracy"] == json.loads((out / "report.json").read_text())["accuracy"] == pytest.approx(2 / 3)
    page = (out / "report.html").read_text()
    assert "right: closed" in page and page.count("data:image/jpeg") == 3
    with pytest.raises(ConfigError, match='question was "is it open\\?" and is "is it shut\\?"'):
        evaluate(tmp_path / "in", out, lambda image: Answer("open", told, 0.0, {}), question="is it shut?")
    Image.fromarray(picture(7)).save(tmp_path / "in" / "open" / "7.png")
    asked = []
    more = evaluate(tmp_path / "in", out, lambda image: asked.append(image) or Answer("open", told, 0.0, {}))
    assert more["images"] == 4 and len(asked) == 1, "only the picture that was added is asked about"
    Image.fromarray(picture(8)).save(tmp_path / "in" / "open" / "7.png")  # as in another folder with the same names
    more = evaluate(tmp_path / "in", out, lambda image: asked.append(image) or Answer("closed", told, 0.0, {}))
    assert more["images"] == 4 and more["accuracy"] == 0.5 and len(asked) == 2


@pytest.mark.parametrize(("told", "says"), [({"closed": 0.4, "open": 0.6}, True), (None, False)])
def test_a_threshold_that_nobody_could_find_is_none_that_fails(tmp_path, told, says):
    """ "none reaches it" was said of answers without probabilities, too, and of an answer that was never given."""
    out = tmp_path / "out"
    report = evaluate(
        write_classes(tmp_path / "in", open=1, closed=1), out, lambda image: Answer("open", told, 0.0, {})
    )
    lines = {line.split()[0]: line for line in format_report(report, out).splitlines() if line.strip()}
    assert ("none reaches it" in lines["open"]) is says and "none reaches it" not in lines["closed"]
    assert (out / "report.html").read_text().count("none reaches it") == says


def test_a_broken_detector_ends_the_run(tmp_path):
    def fail(image):
        raise EngineError("out of memory")

    with pytest.raises(EngineError, match="3 times in a row"):
        evaluate(write_classes(tmp_path / "in", open=2, closed=2), tmp_path / "out", fail)


def test_a_run_without_a_picture_leaves_the_folder_free(tmp_path):
    with pytest.raises(DataError, match="no picture"):
        evaluate_detector([], ("open", "closed"), lambda image: None, tmp_path / "out", 0.9, ABOUT, ["broken"])
    with pytest.raises(DataError, match="no picture could be read: there is none"):
        evaluate_detector([], ("open", "closed"), lambda image: None, tmp_path / "out", 0.9, ABOUT, [])
    answer = Answer("open", {"closed": 0.3, "open": 0.7}, 0.0, {})
    report = evaluate(write_classes(tmp_path / "in", open=2, closed=2), tmp_path / "out", lambda image: answer)
    assert report["accuracy"] == 0.5


def test_the_command_scores_the_embedded_model(tmp_path, capsys):
    folder = write_classes(tmp_path / "in", open=2, closed=2)
    command = ["eval-answers", "--data", str(folder), "--device", "cpu", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--question" in capsys.readouterr().err
    assert main([*command, "--question", "is the drawer open or closed?"]) == 0
    told = json.loads((tmp_path / "out" / "rows.jsonl").read_text().splitlines()[0])["probabilities"]
    assert sum(told.values()) == pytest.approx(1, abs=1e-4)
    assert "4 pictures" in capsys.readouterr().out
