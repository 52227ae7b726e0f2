"""Typed questions: what may be asked, how it is worded, what is answered."""

import json
from dataclasses import replace

import numpy as np
import pytest

from vlm_local.answers import Answerer, Question, build_answer_details, complete_question, decode_question
from vlm_local.engines.scripted import ScriptedEngine
from vlm_local.errors import RequestError
from vlm_local.prompts import load_template
from vlm_local.types import Generation
from vlm_local.wire import encode_array

IMAGE = np.zeros((32, 32, 3), np.uint8)
DRAWER = "is the drawer open? answer yes or no"


def body(**fields):
    return json.dumps({"image": encode_array(IMAGE), "question": DRAWER, "choices": ["yes", "no"], **fields}).encode()


def ask(generate, choices=("yes", "no"), template="paligemma_answer"):
    return Answerer(generate, load_template(template)).answer(Question(IMAGE, "is it open?", choices))


def script(*weights):
    engine = ScriptedEngine(lambda request: np.array(weights), "scripted")
    return lambda request: engine.generate([request])[0]


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        (DRAWER, ("yes", "no"), DRAWER),
        ("is the drawer open?", ("yes", "no"), DRAWER),
        ("Is it open? Answer Yes or No.", ("yes", "no"), "Is it open? Answer Yes or No."),
        ("Is it open? Answer No or Yes.", ("yes", "no"), "Is it open? Answer No or Yes."),
        ("answer open or ajar or shut", ("open or ajar", "shut"), "answer open or ajar or shut"),
        ("where is it?", ("sink", "basket", "invalid"), "where is it? answer sink or basket or invalid"),
        (DRAWER, ("open", "closed"), DRAWER + " answer open or closed"),
    ],
)
def test_a_question_ends_in_its_choices_as_autoeval_words_it(text, choices, expected):
    assert complete_question(text, choices) == expected


def test_paligemma_reads_the_question_alone_as_autoeval_trained_it():
    seen = []

    def generate(request):
        seen.append(request)
        return Generation("no")

    assert ask(generate).choice == "no"
    assert (seen[0].prompt.before, seen[0].prompt.after) == ("", "is it open? answer yes or no")
    assert seen[0].sentences == ("yes", "no")


def test_the_answer_carries_the_probability_of_every_choice():
    answer = ask(script(1, 3))
    assert answer.choice == "no" and answer.probability == 0.75
    assert answer.probabilities == {"yes": 0.25, "no": 0.75}
    told = build_answer_details(replace(answer, missing_mass=0.1), "name")
    assert (told["answer"], told["probability"], told["missing_mass"], told["model"]) == ("no", 0.75, 0.1, "name")


def test_the_likeliest_choice_beats_the_greedy_one_only_when_it_is_certain():
    for missing, expected in ((0.1, "b"), (0.3, "a")):
        told = np.array([0.2, 0.6 - missing, 0.2])
        assert ask(lambda _, p=told, m=missing: Generation("a", p, m), ("a", "b", "c")).choice == expected


def test_an_engine_without_probabilities_still_answers():
    answer = ask(lambda request: Generation("yes"))
    assert (answer.choice, answer.probability, answer.probabilities) == ("yes", None, None)


def test_a_whole_question_is_read_also_from_an_envelope():
    for sent in (body(), json.dumps({"encoded": body().decode()}).encode()):
        question = decode_question(sent)
        assert question.text == DRAWER and question.choices == ("yes", "no") and question.image.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"choices": [f"choice {i}" for i in range(65)]}, "2 to 64 strings, got 65"),
        ({"choices": ["yes"]}, "got 1"),
        ({"choices": "yes or no"}, "got str"),
        ({"choices": ["yes", ""]}, "it is empty"),
        ({"choices": ["yes", "  "]}, "it is empty"),
        ({"choices": ["yes", "yes"]}, "differ at most in case or spaces"),
        ({"choices": ["a", "a"]}, "differ at most in case or spaces"),  # short texts are one object in Python
        ({"choices": ["1", "2", "1"]}, "differ at most in case or spaces"),
        ({"choices": ["gr\u00fcn", "gru\u0308n"]}, "differ at most in case or spaces"),
        ({"choices": ["yes", "Yes"]}, "differ at most in case or spaces"),
        ({"choices": ["in sink", "insink"]}, "differ at most in case or spaces"),
        ({"choices": ["yes", "no "]}, "begins or ends with a space"),
        ({"choices": ["yes", "n\no"]}, "control character"),
        ({"choices": ["yes", 1]}, "expected a string"),
        ({"choices": ["yes", "n" * 201]}, "201 characters"),
        ({"question": "x" * 10_000}, "10000 characters are more than the 2000"),
        ({"question": " "}, "it is empty"),
        ({"question": None}, "expected a string"),
        ({"image": [[0]]}, "image"),
    ],
)
def test_a_bad_question_is_the_clients_fault(fields, words):
    with pytest.raises(RequestError, match=words) as caught:
        decode_question(body(**fields))
    assert caught.value.status == 400


@pytest.mark.parametrize("missing", ["image", "question", "choices"])
def test_a_missing_field_is_named(missing):
    fields = json.loads(body())
    del fields[missing]
    with pytest.raises(RequestError, match=f"'{missing}' is missing"):
        decode_question(json.dumps(fields).encode())
