"""What the tokens of one answer say of every sentence, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from vlm_local.engines.masses import (
    Mass,
    Position,
    Token,
    build_spelling,
    is_constrained,
    list_probabilities,
    locate,
    split,
    weigh,
)

WORDS = ("go", "go on", "stop")


def position(said: str, **top: float) -> Position:
    tokens = {word.replace("_", " "): Token(word.replace("_", " ").encode(), math.log(p)) for word, p in top.items()}
    return Position(tokens[said], tuple(tokens.values()))


def probabilities(positions, said="go", temperature=1.0):
    spelling = build_spelling(WORDS)
    return list_probabilities(spelling, weigh(spelling, said.encode(), positions, temperature)).tolist()


def test_every_token_counts_for_the_sentences_it_leads_to():
    positions = [position("go", go=0.7, stop=0.25), position("END", END=0.6, _on=0.4)]
    assert probabilities(positions) == pytest.approx([0.42, 0.28, 0.25])


def test_a_sentence_that_could_have_ended_earlier_is_counted_too():
    positions = [position("go", go=0.7, stop=0.3), position(" on", _on=0.9, END=0.1), position("END", END=1.0)]
    assert probabilities(positions, "go on") == pytest.approx([0.07, 0.63, 0.3])


def test_another_spelling_of_a_beginning_is_nobodys_alone():
    positions = [position("go", go=0.5, g=0.2, s=0.3), position("END", END=1.0)]
    assert probabilities(positions) == pytest.approx([0.5, 0, 0.3])


def test_without_the_end_token_a_beginning_stays_a_set():
    assert probabilities([position("go", go=0.7, stop=0.3)]) == pytest.approx([0, 0, 0.3])


def test_an_end_token_without_a_number_has_what_the_listed_ones_leave():
    lost = Position(Token(b"END", -math.inf), (Token(b"END", -math.inf), Token(b" on", math.log(0.4))))
    assert probabilities([position("go", go=0.9, stop=0.1), lost]) == pytest.approx([0.54, 0.36, 0.1])
    cut = Position(lost.said, lost.top, is_complete=False)
    assert probabilities([position("go", go=0.9, stop=0.1), cut]) == pytest.approx([0, 0.36, 0.1])


def test_an_only_sentence_has_the_whole_mass_however_it_goes_on():
    lost = Position(Token(b"END", -math.inf), (Token(b"END", -math.inf),))
    positions = [position("st", st=0.9, go=0.1), position("op", op=0.2), lost]
    assert probabilities(positions, "stop") == pytest.approx([0, 0, 0.9])


def test_what_was_said_cannot_have_been_impossible():
    said = Token(b"go", -math.inf)
    assert weigh(build_spelling(WORDS), b"go", [Position(said, (said, Token(b"stop", -0.1)))]) == []


def test_temperature_works_on_every_token():
    positions = [position("go", go=0.8, stop=0.2), position("END", END=1.0)]
    assert probabilities(positions, temperature=0.5)[0] == pytest.approx(0.64 / 0.68)


def test_tokens_that_do_not_spell_the_answer_say_nothing():
    assert weigh(build_spelling(WORDS), b"go", [position("stop", stop=1.0)]) == []


@pytest.mark.parametrize(("share", "expected"), [(1.0, True), (1e-3, False)])
def test_constrained_logprobs_are_told_from_free_ones(share, expected):
    tokens = (Token(b"z", math.log(0.75 * share)), Token(b"zq", math.log(0.25 * share)), Token(b"no", -1.0))
    positions = [Position(tokens[0], tokens), Position(Token(b"qx", math.log(share)), (Token(b"qx", math.log(share)),))]
    assert is_constrained(build_spelling(("zqx",)), positions) is expected


def test_the_draw_is_settled_by_single_sentences_and_else_by_splitting_a_set():
    spelling = build_spelling(WORDS)
    masses = [Mass(0, 2, 0.5), Mass(2, 3, 0.5)]
    assert locate(spelling, masses, 0.6) == 2
    assert locate(spelling, masses, 0.3) is masses[0]
    parted = split(masses, masses[0], [Mass(0, 1, 0.5), Mass(1, 2, 0.5)])
    assert [locate(spelling, parted, uniform) for uniform in (0.0, 0.24, 0.26, 0.49, 0.51, 0.999)] == [0, 0, 1, 1, 2, 2]


def test_the_draw_follows_the_order_of_the_request_not_of_the_spelling():
    spelling = build_spelling(("stop", "go"))
    masses = [Mass(0, 1, 0.3), Mass(1, 2, 0.7)]  # "go" sorts first
    assert [locate(spelling, masses, uniform) for uniform in (0.69, 0.71)] == [0, 1]


def test_splitting_keeps_the_sum_and_drops_what_does_not_narrow():
    masses = [Mass(0, 2, 0.4), Mass(2, 3, 0.6)]
    parted = split(masses, masses[0], [Mass(0, 2, 0.5), Mass(0, 1, 0.1), Mass(1, 2, 0.4)])
    assert sum(mass.probability for mass in parted) == pytest.approx(1.0)
    assert np.isclose(next(mass.probability for mass in parted if mass[:2] == (0, 1)), 0.08)


@pytest.mark.parametrize("children", [[], [Mass(0, 2, 1.0)], [Mass(0, 1, 0.1), Mass(0, 2, 0.9)], [Mass(0, 1, 0.0)]])
def test_an_answer_that_does_not_narrow_settles_nothing(children):
    masses = [Mass(0, 2, 0.4), Mass(2, 3, 0.6)]
    assert split(masses, masses[0], children) == []
