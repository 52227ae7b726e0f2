"""What an API's log-probabilities say: bounds, draws and the likeliest phrase, against exact numbers."""

import numpy as np
import pytest

from tests.engines.asking import SENTENCES, ask, build_request
from tests.engines.fake_model import weigh_sentences
from tests.engines.fake_server import FakeServer
from tests.slow import slow
from vlm_local.engines.chat_api import encode_image
from vlm_local.errors import ConfigError, EngineError


@pytest.mark.parametrize("choices", [("yes", "no"), ("sink", "basket", "invalid")])
def test_probabilities_of_short_answers_are_exact(open_engine, server, choices):
    engine = open_engine(server)
    for seed in range(5):
        request = build_request(seed, choices)
        (answer,) = engine.generate([request])
        expected = weigh_sentences(encode_image(request.image), choices)
        assert answer.probabilities == pytest.approx(expected)
        assert answer.missing_mass == pytest.approx(0, abs=1e-9)
        assert answer.sentence == choices[expected.argmax()]


@pytest.mark.parametrize("habit", ["", "no_end", "null_end", "null_masked", "five", "clips"])
def test_probabilities_of_phrases_are_lower_bounds(open_engine, server, habit):
    server.habit = habit
    engine = open_engine(server)
    for seed in range(2):
        request = build_request(seed)
        (answer,) = engine.generate([request])
        expected = weigh_sentences(encode_image(request.image), SENTENCES)
        assert (answer.probabilities <= expected + 1e-9).all()
        assert answer.missing_mass == pytest.approx(1 - answer.probabilities.sum())
        if habit != "no_end":
            said = SENTENCES.index(answer.sentence)
            assert answer.probabilities[said] == pytest.approx(expected[said])


@pytest.mark.parametrize(
    ("temperature", "habit"),
    [(1.0, ""), slow(0.5, ""), slow(2.0, ""), slow(1.0, "null_end"), (2.0, "null_end"), slow(1.0, "null_masked")],
)
def test_a_draw_is_the_inverse_cdf_at_the_seed(open_engine, server, temperature, habit):
    server.habit = habit
    engine = open_engine(server)
    uniforms = np.random.default_rng(1).random(12)
    questions = 0
    for seed, uniform in enumerate(uniforms):
        request = build_request(seed, decide="sample", uniform=float(uniform), temperature=temperature)
        (answer,) = engine.generate([request])
        cdf = weigh_sentences(encode_image(request.image), SENTENCES, temperature).cumsum()
        assert answer.sentence == SENTENCES[int(np.searchsorted(cdf, uniform, side="right"))]
        questions += answer.stats["questions"]
    assert questions > len(uniforms)  # some draws had to ask again


@pytest.mark.parametrize("habit", ["no_logprobs", "raw_logprobs", "refuses_logprobs"])
def test_without_usable_logprobs_there_is_no_probability_and_no_draw(open_engine, server, habit):
    server.habit = habit
    engine = open_engine(server)
    answer = ask(engine)
    assert answer.sentence in SENTENCES and answer.probabilities is None
    assert "not given" in engine.metadata["about_probability"]
    with pytest.raises(ConfigError, match="--decide greedy"):
        engine.check("sample", "off")
    assert isinstance(ask(engine, decide="sample", uniform=0.5), EngineError)


@pytest.mark.parametrize(
    ("habit", "reason"),
    [("five", "only the 5 likeliest"), ("clips", "only the 5 likeliest"), ("no_end", "answer's end")],
)
def test_lists_that_say_too_little_are_good_for_greedy_alone(open_engine, server, habit, reason):
    server.habit = habit
    engine = open_engine(server)
    assert "lower bounds" in engine.metadata["about_probability"] and reason in engine.metadata["about_decide"]
    engine.check("greedy", "off")
    with pytest.raises(ConfigError, match=f"{reason}.*; use --decide greedy"):
        engine.check("sample", "off")


def test_a_draw_that_cannot_be_settled_is_a_fault_of_its_own(open_engine, server):
    engine = open_engine(server)
    server.habit = "no_end"
    choices = ("go", "go on", "go on up")
    drawn = [build_request(seed, choices, decide="sample", uniform=0.99) for seed in range(6)]
    outcomes = engine.generate([*drawn, build_request(0)])
    assert any(isinstance(outcome, EngineError) and "no usable log-prob" in str(outcome) for outcome in outcomes[:-1])
    assert outcomes[-1].sentence in SENTENCES


def test_the_likeliest_phrase_is_the_exact_one(open_engine, server):
    engine = open_engine(server)
    said = []
    for seed in range(12):
        request = build_request(seed, decide="map")
        (answer,) = engine.generate([request])
        assert answer.sentence == SENTENCES[weigh_sentences(encode_image(request.image), SENTENCES).argmax()]
        said.append(answer.sentence == ask(engine, seed=seed).sentence)
    assert not all(said)  # greedy is another thing


def test_the_exact_posterior_is_refused(open_engine, server):
    with pytest.raises(ConfigError, match="so use fast"):
        open_engine(server).check("greedy", "exact")


def test_json_with_spaces_is_read(open_engine):
    with FakeServer("hosted") as server:
        server.habit = "spaces"
        answer = ask(open_engine(server))
        assert answer.sentence in SENTENCES and answer.probabilities is None
