"""Benchmarks of multiple-choice questions: files as VLMEvalKit writes them, a model's answers, scores, comparison."""

import base64
import csv
import hashlib
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.tiny_models import tiny_checkpoint
from vlm_local.answers import Answer
from vlm_local.cli import main
from vlm_local.data.multiple_choice import count_questions, open_questions
from vlm_local.errors import DataError, EngineError, RequestError
from vlm_local.lab.multiple_choice.run import evaluate_questions

PLACE = {"question": "Where is the red block?", "A": "left", "B": "right", "answer": "A", "category": "place"}
COLOUR = {"question": "Is there a red block?", "answer": "Yes", "category": "colour"}
POLICY = {"policy": {"name": "eyes"}, "data": "bench.tsv", "data_sha256": 64 * "0"}


def draw(is_left, number=0, mode="RGB", kind="JPEG"):
    """A red block on white, as a file in base64. number: makes it another picture."""
    pixels = np.full((40, 60, 3), 250 - number, np.uint8)
    pixels[10:30, 5:25] = (200, 20, 20) if is_left else pixels[0, 0]
    pixels[10:30, 35:55] = pixels[0, 0] if is_left else (200, 20, 20)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


NAMES = ("index", "image", "question", "A", "B", "C", "answer", "category", "hint", "image_path", "options")


def write(path, rows, names=NAMES):
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, names, dialect=csv.excel_tab)
        table.writeheader()
        table.writerows({"index": index, **row} for index, row in enumerate(rows))
    return path


def read(path):
    problems = []
    return list(open_questions(path, lambda error: problems.append(str(error)))), problems


class Eyes:
    """Says where the red block is; of what it cannot see, the first choice."""

    def __init__(self, fault=None):
        self.asked, self._fault = [], fault

    def __call__(self, image, prompt, choices):
        self.asked.append((image, prompt, choices))
        if self._fault is not None:
            raise self._fault
        red = (image[..., 0].astype(int) - image[..., 1] > 100).any(axis=0)
        choice = choices[int(red[30:].any())] if red.any() else choices[0]
        return Answer(choice, {each: 0.7 if each == choice else 0.3 for each in choices}, 0.0, {})


def test_a_question_is_read_as_it_stands_in_the_file(tmp_path):
    large = 'first line\n"quoted"\tand a tab'
    rows = [
        {**PLACE, "image": draw(True), "hint": "Look.", "question": large, "C": "ü behind"},
        {**COLOUR, "image": draw(True)},
    ]
    (question, other), problems = read(write(tmp_path / "bench.tsv", rows))
    assert problems == [] and count_questions(tmp_path / "bench.tsv") == 2
    letters = "A. left\nB. right\nC. ü behind"
    assert question.text == f"Look.\n{large}\n{letters}\nAnswer with the letter of the right choice."
    assert (question.index, question.answers, question.label, question.category) == ("0", ("A", "B", "C"), "A", "place")
    assert question.pictures[0].shape == (40, 60, 3) and question.pictures[0][20, 15].argmax() == 0
    assert (other.text, other.answers) == ("Is there a red block?\nAnswer Yes or No.", ("Yes", "No"))


def test_a_picture_may_stand_in_another_row_in_a_list_or_beside_the_file(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").write_bytes(base64.b64decode(draw(False, mode="P", kind="PNG")))
    rows = [
        {**PLACE, "image": "1"},  # before the row that it names
        {**PLACE, "image": draw(True)},
        {**PLACE, "image": repr([draw(True), draw(False)])},
        {**PLACE, "image_path": "pictures/one.png"},
        {**PLACE, "image_path": repr(["pictures/one.png", "pictures/one.png"])},
        *({**PLACE, "image": draw(True, mode=mode, kind="PNG")} for mode in ("L", "P", "RGBA")),
        {**PLACE, "image": base64.encodebytes(base64.b64decode(draw(True))).decode()},  # in lines
        {**PLACE, "image": base64.b64encode(base64.b64decode(draw(True)) + bytes(200_000)).decode()},  # a large one
    ]
    questions, problems = read(write(tmp_path / "bench.tsv", rows))
    assert problems == [] and [len(each.pictures) for each in questions] == [1, 1, 2, 1, 2, 1, 1, 1, 1, 1]
    assert questions[0].sha256 == questions[1].sha256 != questions[3].sha256
    assert all(picture.shape == (40, 60, 3) for each in questions for picture in each.pictures)
    names = ("index", "image_path", "question", "A", "B", "answer")
    (question,), _ = read(write(tmp_path / "bench.tsv", [{name: rows[3][name] for name in names[1:]}], names))
    assert (question.sha256, question.category) == (questions[3].sha256, "-")


@pytest.mark.parametrize(
    ("said", "label"), [("b", "B"), ("right", "B"), ("left", "A"), (" A ", "A"), ("(B)", "B"), ("A.", "A")]
)
def test_the_right_answer_is_a_letter_or_its_words(tmp_path, said, label):
    (question,), _ = read(write(tmp_path / "bench.tsv", [{**PLACE, "image": draw(True), "answer": said}]))
    assert question.label == label


@pytest.mark.parametrize(
    ("listed", "answer", "choices"),
    [
        ('["left", "right, far"]', "B", ("left", "right, far")),
        (" ['left', 'right']", "right", ("left", "right")),
        ("[1, 2.5]", "2.5", ("1", "2.5")),
        (r'["\ud83d\ude00", "b"]', "B", ("😀", "b")),
        ("[2.0, 3.0]", "3", ("2.0", "3.0")),  # pandas makes floats of a column with an empty cell
        ('["left", "right", "", "nan"]', "B", ("left", "right")),
    ],
)
def test_choices_may_be_a_list(tmp_path, listed, answer, choices):
    row = {"question": "Where?", "image": draw(True), "options": listed, "answer": answer}
    names = ("index", "image", "question", "options", "answer")
    (question,), _ = read(write(tmp_path / "bench.tsv", [row], names))
    assert (question.options, question.label) == (dict(zip("AB", choices, strict=True)), "B")


def test_an_empty_cell_of_pandas_is_no_choice_but_none_is(tmp_path):
    row = {"question": "How many?", "image": draw(True), "A": "None", "B": "Two", "C": "nan", "answer": "A"}
    (question,), _ = read(write(tmp_path / "bench.tsv", [{**row, "hint": "NaN", "category": "nan"}]))
    assert question.options == {"A": "None", "B": "Two"} and question.text.startswith("How many?\n")
    assert question.category == "-"


def test_a_letter_is_a_letter_where_it_is_also_the_words_of_another_choice(tmp_path):
    row = {**PLACE, "image": draw(True), "A": "B", "B": "A", "answer": "B"}
    (question,), _ = read(write(tmp_path / "bench.tsv", [row]))
    assert question.label == "B"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": ""}, "the right answer is ''"),
        ({"answer": "C"}, "expected one of A, B"),
        ({"A": "us", "B": "US", "answer": "US"}, "the right answer is 'US'"),
        ({"A": "3.0", "B": "3.00", "answer": "3"}, "the right answer is '3'"),
        ({"B": ""}, "two choices or more"),
        ({"question": " "}, "expected a question"),
        ({"A": "", "B": "", "options": repr(list(range(27)))}, "27 choices"),
        ({"image": "77"}, "names the row 77"),
        ({"image": ""}, "0 pictures"),
        ({"image": "[" * 99}, "a list of texts was expected"),
        ({"image": "[" + "{}, " * 99 + "]"}, "a list of texts was expected"),
        ({"image": "é" * 99}, "base64"),
        ({"image": base64.b64encode(b"no picture" * 20).decode()}, "not a readable PNG or JPEG"),
        ({"image": "", "image_path": "../secret.png"}, "is not in the folder"),
        ({"image": "", "image_path": "/etc/passwd"}, "is not in the folder"),
    ],
)
def test_a_question_that_cannot_be_asked_is_left_out_with_the_reason(tmp_path, change, says):
    rows = [
        {**PLACE, "image": draw(True), **change},
        {**PLACE, "image": draw(True)},
        {**PLACE, "index": 1, "image": draw(True)},
    ]
    questions, problems = read(write(tmp_path / "bench.tsv", rows))
    assert [each.index for each in questions] == ["1"]
    assert len(problems) == 2 and says in problems[0] and "another row has this index" in problems[1]


@pytest.mark.parametrize(
    "text", ["", "question,answer\n", "index\tquestion\tanswer\n1\t?\tA\n", "index\timage\tquestion\n"]
)
def test_a_file_of_another_kind_is_refused(tmp_path, capsys, text):
    (tmp_path / "bench.tsv").write_text(text)
    assert main(["eval-choices", "--data", str(tmp_path / "bench.tsv"), "--out", str(tmp_path / "out")]) == 2
    assert "has no column" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    (tmp_path / "bench.tsv").write_text("index\timage\tquestion\tA\tB\tA\tanswer\n")
    with pytest.raises(DataError, match="has several columns 'A'"):
        read(tmp_path / "bench.tsv")


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ('B\tplace\t"hint', "line 4: unexpected end of data"),  # takes in all rows behind it
        ("B\tplace\t\t", "line 2: 9 cells in 8 columns"),  # as after a tab in the question
    ],
)
def test_a_file_whose_cells_would_get_into_others_is_refused(tmp_path, last, says):
    rows = [f"{index}\t{draw(True, index)}\tWhere?\tleft\tright\t" for index in range(3)]
    lines = [
        "index\timage\tquestion\tA\tB\tanswer\tcategory\thint",
        rows[0] + last,
        *(row + "A\tplace\t" for row in rows[1:]),
    ]
    (tmp_path / "bench.tsv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=says):
        read(tmp_path / "bench.tsv")


def test_seeing_is_told_from_knowing(tmp_path):
    """Places are seen; that a block is red, the first choice, is said without looking."""
    rows = [
        {**PLACE, "image": draw(left, number), "answer": "AB"[not left]}
        for number, left in enumerate([True, False] * 6)
    ]
    rows += [{**COLOUR, "image": draw(True, number)} for number in range(20, 28)]
    questions, _ = read(write(tmp_path / "bench.tsv", rows))
    eyes = Eyes()
    report = evaluate_questions(questions, eyes, tmp_path / "out", POLICY, [])
    told = {measure["name"]: measure for measure in report["measures"]}
    values = {name: (each["seeing"]["value"], each["blind"]["value"]) for name, each in told.items()}
    assert values == {"all questions": (1.0, 0.7), "place": (1.0, 0.5), "colour": (1.0, 1.0)}
    assert told["place"]["difference"]["value"] == 0.5 and told["place"]["difference"]["p_value"] < 0.05
    assert told["colour"]["difference"]["p_value"] == 1.0
    assert (report["questions"], report["pictures"], report["chance"]) == (20, 20, 0.5)
    assert (report["said"], report["right"]) == ({"A": 6, "B": 6, "Yes": 8},) * 2
    assert [measure["group"] for measure in report["measures"]] == ["", "category", "category"]
    assert report["calibration"]["ece"] == pytest.approx(0.3)  # always right, and 70 % sure
    grey, prompt, choices = eyes.asked[1]
    assert (grey == 127).all() and grey.shape == (40, 60, 3) and choices == ("A", "B")
    assert prompt.after == questions[0].text and not prompt.before and not prompt.pictures
    page = (tmp_path / "out" / "report.html").read_text()
    assert "eyes on bench.tsv" in page and page.count("<figure") == 20


def test_a_category_named_like_the_total_is_another_row(tmp_path):
    rows = [{**PLACE, "image": draw(True, number), "category": "all questions"} for number in range(3)]
    rows += [{**COLOUR, "image": draw(True)}]
    questions, _ = read(write(tmp_path / "bench.tsv", rows))
    measures = evaluate_questions(questions, Eyes(), tmp_path / "out", POLICY, [])["measures"]
    told = [(measure["name"], measure["group"], measure["n"]) for measure in measures]
    assert told == [
        ("all questions", "", 4),
        ("all questions (category)", "category", 3),
        ("colour", "category", 1),
    ]


def test_several_pictures_are_shown_in_their_order(tmp_path):
    row = {**PLACE, "image": repr([draw(True), draw(False)])}
    questions, _ = read(write(tmp_path / "bench.tsv", [row]))
    eyes = Eyes()
    evaluate_questions(questions, eyes, tmp_path / "out", POLICY, [])
    (last, prompt, _), (grey, blind, _) = eyes.asked
    assert (prompt.pictures[0].pixels == questions[0].pictures[0]).all() and (last == questions[0].pictures[1]).all()
    assert (blind.pictures[0].pixels == 127).all() and (grey == 127).all()


def test_a_stopped_run_goes_on_where_it_was(tmp_path, capsys):
    rows = [{**PLACE, "image": draw(True, number)} for number in range(4)]
    questions, _ = read(write(tmp_path / "bench.tsv", rows))
    evaluate_questions(questions[:3], Eyes(), tmp_path / "out", POLICY, [])
    eyes = Eyes()
    assert evaluate_questions(questions, eyes, tmp_path / "out", POLICY, [])["questions"] == 4
    assert len(eyes.asked) == 2
    evaluate_questions(questions[1:], eyes, tmp_path / "out", POLICY, [])  # of a file without its first
    copied = shutil.copytree(tmp_path / "out", tmp_path / "same")
    assert main(["compare", str(tmp_path / "out"), str(copied)]) == 2
    assert "has 4 rows and a report of 3" in capsys.readouterr().err


def test_three_failures_in_a_row_end_it_and_are_asked_again(tmp_path):
    rows = [{**PLACE, "image": draw(True, number)} for number in range(5)]
    questions, _ = read(write(tmp_path / "bench.tsv", rows))
    with pytest.raises(EngineError, match="failed 3 times in a row"):
        evaluate_questions(questions, Eyes(EngineError("out of memory")), tmp_path / "out", POLICY, [])
    report = evaluate_questions(questions, Eyes(), tmp_path / "out", POLICY, [])
    assert (report["questions"], report["failed"]) == (5, 0)


def test_a_failure_counts_as_a_wrong_answer_and_is_asked_again(tmp_path):
    rows = [{**PLACE, "image": draw(True, number, kind="PNG")} for number in range(3)]
    questions, _ = read(write(tmp_path / "bench.tsv", rows))
    eyes = Eyes()

    def ask(image, prompt, choices):
        if image[0, 0, 0] == 249:
            raise EngineError("out of memory")
        return eyes(image, prompt, choices)

    report = evaluate_questions(questions, ask, tmp_path / "out", POLICY, [])
    (measure,) = report["measures"]
    assert (report["failed"], report["said"], measure["seeing"]["value"]) == (1, {"A": 2}, pytest.approx(2 / 3))
    assert report["calibration"]["ece"] == pytest.approx(0.3)  # of the two answers
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1 questions got no answer" in page
    assert re.findall("<figcaption>([^,;]+)", page) == ["no answer", "A", "A"]  # what is wrong is shown first
    report = evaluate_questions(questions, eyes, tmp_path / "out", POLICY, [])
    assert (report["failed"], report["said"]) == (0, {"A": 3})


def test_a_model_without_probabilities_has_no_calibration(tmp_path):
    questions, _ = read(write(tmp_path / "bench.tsv", [{**PLACE, "image": draw(True)}]))
    report = evaluate_questions(questions, lambda *_: Answer("A", None, None, {}), tmp_path / "out", POLICY, [])
    assert report["calibration"] is None and report["measures"][0]["seeing"]["value"] == 1
    assert "calibration error" not in (tmp_path / "out" / "report.html").read_text()


def test_what_a_model_cannot_be_asked_is_left_out(tmp_path):
    questions, _ = read(write(tmp_path / "bench.tsv", [{**PLACE, "image": draw(True)}]))
    left_out = []
    with pytest.raises(DataError, match="reads one picture"):
        evaluate_questions(questions, Eyes(RequestError("it reads one picture")), tmp_path / "out", POLICY, left_out)
    assert left_out == ["index 0: it reads one picture"]


def test_two_models_are_compared_on_the_same_questions(tmp_path, capsys):
    rows = [
        {**PLACE, "image": draw(left, number), "answer": "AB"[not left]}
        for number, left in enumerate([True, False] * 4)
    ]
    rows += [{**COLOUR, "image": draw(True, 0)}]
    data = write(tmp_path / "bench.tsv", rows)
    questions, _ = read(data)
    evaluate_questions(questions, Eyes(), tmp_path / "eyes", POLICY, [])
    flags = ["--policy", str(tiny_checkpoint("qwen2-vl")), "--device", "cpu"]
    assert main(["eval-choices", "--data", str(data), *flags, "--out", str(tmp_path / "tiny")]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["questions"] == 9 and sum(told["said"].values()) == 9
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    report = json.loads((tmp_path / "tiny" / "report.json").read_text())
    assert report["data_sha256"] == digest and report["policy"]["dtype"] == "float32"
    assert not {"decide", "history", "prompt", "steps"} & set(report["policy"])  # of driving: they decide no answer
    assert main(["compare", str(tmp_path / "eyes"), str(tmp_path / "tiny")]) == 0
    out = capsys.readouterr().out
    assert "9 shared questions in 8 pictures; data bench.tsv" in out
    assert main(["pack", str(tmp_path / "tiny")]) == main(["verify", str(tmp_path / "tiny.evidence.zip")]) == 0
    names = [measure["name"] for measure in json.loads(out.splitlines()[-1])["measures"]]
    assert names == ["all questions", "colour", "place"]


def test_a_table_is_as_wide_as_its_longest_category_and_cannot_steer_a_terminal(tmp_path, capsys):
    names = ("Functional_Correspondence_of_Parts", "\x1b[31mred")
    rows = [{**PLACE, "image": draw(True, number), "category": names[number % 2]} for number in range(4)]
    data, out = write(tmp_path / "bench.tsv", rows), str(tmp_path / "out")
    flags = ["--policy", str(tiny_checkpoint("qwen2-vl")), "--device", "cpu"]
    assert main(["eval-choices", "--data", str(data), *flags, "--out", out]) == 0
    shutil.copytree(out, tmp_path / "other")
    assert main(["compare", out, str(tmp_path / "other")]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told and told.count("\n" + r"\x1b[31mred  ") == 2
    lines = [line for line in told.splitlines() if line.startswith((names[0], "all questions"))]
    assert len(lines) == 4 and len({len(line) for line in lines[:2]}) == len({len(line) for line in lines[2:]}) == 1


def test_options_of_a_robot_are_none_of_a_question(tmp_path, capsys):
    """They would change nothing."""
    for command in ("eval-choices", "eval-answers"):
        words = [command, "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--contrast", "1"]
        with pytest.raises(SystemExit):
            main(words)
        assert "there is no option --contrast" in capsys.readouterr().err


def test_a_policy_server_is_refused(tmp_path, capsys):
    data = write(tmp_path / "bench.tsv", [{**PLACE, "image": draw(True)}])
    command = ["eval-choices", "--data", str(data), "--policy", "http://127.0.0.1:1", "--out", str(tmp_path / "out")]
    assert main(command) == 2 and "give the model itself" in capsys.readouterr().err
