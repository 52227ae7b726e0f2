"""The measure itself: policies with known faults land where theory puts them. Nothing is drawn."""

from pathlib import Path

import numpy as np
import pytest

from vlm_local.lab.spatial.run import ask
from vlm_local.lab.spatial.scenes import CHANGES, EMPTIES, KEEPS, TURNS
from vlm_local.lab.spatial.scores import score_study
from vlm_local.lab.spatial.sets import Gallery, load_set, require_frozen
from vlm_local.primitives import format_phrase
from vlm_local.sim.block_tasks import COLOURS
from vlm_local.types import AXES, Decision, Primitive

SETS = Path(__file__).parents[3] / "docs" / "spatial"
NUM_SCENES = 40
UNSURE = np.full((6, 3), 1 / 3)


def certain(signs) -> np.ndarray:
    return np.eye(3)[np.array(signs) + 1]


def decide(probabilities) -> Decision:
    marginals = {axis: tuple(values) for axis, values in zip(AXES, probabilities, strict=True)}
    return Decision(np.zeros(7), format_phrase(Primitive()), marginals=marginals)


def oracle(view, scene):
    return UNSURE if view.signs is None else certain(view.signs)


def blind_to(axis: int):
    def answer(view, scene):
        probabilities = oracle(view, scene).copy()
        probabilities[axis] = 1 / 3
        return probabilities

    return answer


def colour_blind(view, scene):
    """Any of the blocks, alike."""
    return UNSURE if view.signs is None else np.mean([certain(signs) for signs in view.ways.values()], axis=0)


def language_blind(view, scene):
    """Always the block whose colour comes first in a list, whatever it was told; an empty picture leaves it unsure."""
    if view.change.image != "same":
        return UNSURE
    return certain(view.ways[min(view.ways, key=list(COLOURS).index)])


def prior_only(view, scene):
    return certain(Primitive(x=1, z=-1))


def noisy(share: float):
    """The oracle, with `share` of its answers replaced by random signs."""
    rng = np.random.default_rng(5)

    def answer(view, scene):
        return certain(rng.integers(-1, 2, 6)) if rng.random() < share else oracle(view, scene)

    return answer


class Views:
    """All views of the frozen set, shown once and kept: a gallery that costs nothing to visit again."""

    def __init__(self):
        frozen = load_set(SETS / "normal.json")
        gallery = Gallery(frozen, drawn=False)
        self._views = list(gallery.show_all())
        require_frozen(frozen, gallery.frozen)

    def show_all(self):
        return iter(self._views)


@pytest.fixture(scope="module")
def views():
    return Views()


def score(views, answer):
    rows = ask(views, lambda view, scene: decide(answer(view, scene)))
    return score_study(rows, seed=0)


def value(line) -> float:
    return pytest.approx(line["value"], abs=1e-5)


@pytest.mark.slow
def test_every_change_says_something_in_every_scene(views):
    changes = score(views, oracle)["changes"]
    wanted = {"mirror": "y", "across-x": "x", "across-y": "y", "lowered": "z", "swap-colours": "xy", "name-other": "xy"}
    for name, axes in wanted.items():
        counts = {axis: line["n"] for axis, line in changes[name]["axes"].items() if line["n"]}
        assert set(counts) == set(axes), name
        assert min(counts.values()) > 0.8 * NUM_SCENES, name
    assert all(changes[name]["n"] == 6 * NUM_SCENES for name in CHANGES if name not in wanted)


def test_the_perfect_oracle(views):
    scores = score(views, oracle)
    assert 1 == value(scores["turned"]) == value(scores["right"])
    assert 0 == value(scores["moved"]) == value(scores["left"])
    assert all(line["beside"]["value"] in (None, 0) for line in scores["changes"].values() if line["rule"] == TURNS)


@pytest.mark.parametrize(("axis", "blind", "seeing"), [("y", "across-y", "across-x"), ("x", "across-x", "across-y")])
def test_blind_left_and_right_or_in_depth(views, axis, blind, seeing):
    scores = score(views, blind_to(AXES.index(axis)))
    assert 0 == value(scores["changes"][blind]) == value(scores["changes"]["swap-colours"]["axes"][axis])
    assert 1 == value(scores["changes"][seeing]) == value(scores["changes"]["lowered"])
    assert (value(scores["changes"]["mirror"]) == 0) == (axis == "y")
    assert 0 == value(scores["moved"]) == value(scores["right"]["axes"][axis])


def test_blind_to_colour(views):
    scores = score(views, colour_blind)
    assert 0 == value(scores["changes"]["swap-colours"]) == value(scores["changes"]["name-other"])
    assert 1 / 3 == value(scores["changes"]["across-x"]) == value(scores["changes"]["across-y"])  # one block of three
    assert value(scores["moved"]) == 0


def test_blind_to_language(views):
    scores = score(views, language_blind)
    assert value(scores["changes"]["name-other"]) == 0
    assert scores["changes"]["negated"]["value"] > 0.3 and scores["changes"]["impossible"]["value"] > 0.3
    assert value(scores["changes"]["blank"]) == 0
    # It follows its colour: to the right place if that was named, away from it if the other block had it.
    followed = [
        {0: 1, 1: -1}.get([colour for colour, _ in view.scene.blocks].index("red"), 0)
        for _, view in views.show_all()
        if view.change.name == "none"
    ]
    assert scores["changes"]["swap-colours"]["value"] == pytest.approx(np.mean(followed), abs=0.06)


def test_prior_only(views):
    scores = score(views, prior_only)
    assert 0 == value(scores["turned"]) == value(scores["moved"])
    for name, change in CHANGES.items():
        if change.rule == EMPTIES:
            assert {axis: line["value"] for axis, line in scores["changes"][name]["axes"].items()} == {
                axis: float(axis in "xz") for axis in AXES
            }


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_an_oracle_with_noise(views, share):
    """Right with 1 - share, else any sign alike."""
    scores = score(views, noisy(share))
    same = (1 - share) ** 2 + 2 * share * (1 - share) / 3 + share**2 / 3
    for measure, theory in (("turned", 1 - share), ("moved", 1 - same), ("right", 1 - share)):
        low, high = scores[measure]["interval"]
        assert low - 0.03 < theory < high + 0.03, measure
        assert high - low < 0.45
    assert 0 < share * 2 / 3 - scores["left"]["value"] + 0.1 < 0.2  # of random signs, two in three are a direction


def test_intervals_hold_what_they_say(views):
    """Chance is over scenes: one is right or unsure as a whole, and of 10 such policies most have the truth inside."""
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(10):
        noise = rng.random(NUM_SCENES) < 0.3
        scores = score(views, lambda view, scene, noise=noise: UNSURE if noise[scene] else oracle(view, scene))
        low, high = scores["turned"]["interval"]
        hits += low <= 0.7 <= high
    assert hits >= 7


def test_rules_are_the_oracles(views):
    """Whatever `keeps` leaves the oracle's answer alone; whatever `turns` turns it on some axis."""
    rows = ask(views, lambda view, scene: decide(oracle(view, scene)))
    for scene in range(NUM_SCENES):
        signs = {row["change"]: row["signs"] for row in rows if row["scene"] == scene}
        for name, change in CHANGES.items():
            if change.rule == KEEPS:
                assert signs[name] == signs["none"]
            elif change.rule == TURNS:
                assert -1 in np.multiply(signs[name], signs["none"])
