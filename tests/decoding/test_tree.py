"""The tree decoder against the outlines reference, for every family, in float32."""

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare, share_tiny, shuffle_head
from tests.slow import FAMILIES, slow
from tests.tiny_models.names import FAMILIES as ALL
from tests.tiny_models.names import MIXED
from vlm_local.decoding import tree
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.session import Session
from vlm_local.decoding.tree import Budget, TreeDecoder

CASES = [(family, 0) for family in ("qwen2-vl", "paligemma2")]
CASES += [slow(family, seed) for family in ALL for seed in range(3) if (family, seed) not in CASES]
ALL_PHRASES = [("qwen2-vl", 1), ("paligemma", 0)]
YES_NO = ("yes", "no")


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_greedy_says_what_outlines_says(family, seed):
    loaded, processing = load_tiny(family, seed)
    outlines, said = OutlinesDecoder(loaded), set()
    seeds = range(4 if seed else 2)
    for head in range(4):
        shuffle_head(loaded, 10 * seed + head)
        decoder = TreeDecoder(loaded, Budget(draft=(1, 16, 32, 600)[head], step=(1, 2, 16, 16)[head]))
        options = [{"sentences": PHRASES, "drafts": PHRASES[n::200]} for n in seeds]
        prepared = prepare(processing, *(draw_request(100 * head + n, **each) for n, each in enumerate(options)))
        answers = [decoder.decode([each])[0].sentence for each in prepared]
        assert answers == [each.sentence for each in outlines.decode(prepared)]
        said |= set(answers)
    assert len(said) > 3  # or the comparison would say little


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_naive_scoring(family, seed):
    loaded, processing = load_tiny(family, seed)
    shuffle_head(loaded, seed, scale=0.2)
    sentences = PHRASES if (family, seed) in ALL_PHRASES else PHRASES[seed::9]
    [prepared] = prepare(processing, draw_request(seed, sentences=sentences, posterior="exact"))
    exact, truth = TreeDecoder(loaded).decode([prepared])[0], OutlinesDecoder(loaded).decode([prepared])[0]
    assert exact.sentence == truth.sentence
    np.testing.assert_allclose(exact.probabilities, truth.probabilities, atol=1e-5)
    assert exact.probabilities.sum() == pytest.approx(1.0) and exact.missing_mass < 1e-9
    # Every sentence, and so every branch of the trie, is drawn by a number in the middle of its share.
    cumulative = truth.probabilities.cumsum()
    drawn = np.flatnonzero(truth.probabilities > 1e-5)[:: 1 if len(sentences) < 100 else 6]
    middles = cumulative[drawn] - truth.probabilities[drawn] / 2
    requests = [draw_request(seed, sentences=sentences, decide="sample", uniform=float(u)) for u in middles]
    decoder = TreeDecoder(loaded)
    for first in range(0, len(requests), 16):
        answers = decoder.decode(prepare(processing, *requests[first : first + 16]))
        assert [each.sentence for each in answers] == [sentences[i] for i in drawn[first : first + 16]]


@pytest.mark.parametrize("family", ["qwen2-vl", "smolvlm2", *map(slow, ("qwen3-vl", "paligemma2"))])
def test_map_and_sample_follow_the_exact_distribution(family):
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 3, scale=0.3)
    decoder, outlines = TreeDecoder(loaded), OutlinesDecoder(loaded)
    sentences = PHRASES[::27]
    for n, temperature in enumerate((0.5, 3.0)):
        options = [
            {"decide": "map"},
            *({"decide": "sample", "uniform": u, "temperature": temperature} for u in (0.0, 0.4, 0.8, 0.999)),
        ]
        prepared = prepare(processing, *(draw_request(n, sentences=sentences, **each) for each in options))
        fast, truth = decoder.decode(prepared), outlines.decode(prepared)
        assert [each.sentence for each in fast] == [each.sentence for each in truth]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_posterior_is_a_lower_bound_with_a_certified_rest(family):
    loaded, processing = share_tiny(family)
    fast, exact = (
        TreeDecoder(loaded).decode(prepare(processing, draw_request(1, posterior=kind)))[0]
        for kind in ("fast", "exact")
    )
    assert (fast.probabilities <= exact.probabilities + 1e-6).all()
    assert fast.missing_mass == pytest.approx(1 - fast.probabilities.sum())
    assert fast.missing_mass <= 0.01 or fast.stats["nodes"] >= Budget().fast_total


def test_a_flat_distribution_is_foreseen_from_the_step_before():
    """No phrase has half of the probability. What was said until then would fill the draft with the wrong ones."""
    loaded, processing = load_tiny("qwen2-vl")
    shuffle_head(loaded, 0, scale=0.3)
    decoder, said, answers = TreeDecoder(loaded), (), []
    for picture in (0, 1, 1):
        request = draw_request(picture, sentences=PHRASES, posterior="fast", episode="a", drafts=said)
        answers += decoder.decode(prepare(processing, request))
        said = (answers[-1].sentence, *said)
    assert answers[2].probabilities.max() < 0.5 and answers[2].missing_mass < 0.01
    assert [answer.stats["forwards"] for answer in answers[1:]] == [2, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_each_alone(family):
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 1)
    requests = [
        draw_request(0),
        draw_request(1, side=96, before="Answer in one phrase, please, and take your time.", posterior="exact"),
        draw_request(2, side=40, before="", decide="sample", uniform=0.7, temperature=2.0),
        draw_request(3, sentences=YES_NO, decide="map", posterior="fast"),
        draw_request(4, sentences=("only this",), posterior="exact"),
        draw_request(5, decide="map", drafts=PHRASES[40:44]),
    ]
    decoder = TreeDecoder(loaded)
    together = decoder.decode(prepare(processing, *requests))
    for request, answer in zip(requests, together, strict=True):
        [alone] = decoder.decode(prepare(processing, request))
        assert alone.sentence == answer.sentence
        if request.posterior != "off":
            np.testing.assert_allclose(alone.probabilities, answer.probabilities, atol=1e-5)
    assert together[4].stats["forwards"] == 0 and together[4].probabilities.tolist() == [1.0]


def test_what_was_said_last_costs_one_forward():
    loaded, processing = load_tiny("qwen2-vl")
    decoder = TreeDecoder(loaded)
    for head in range(6):
        shuffle_head(loaded, head)
        decoder = TreeDecoder(loaded)
        [first] = decoder.decode(prepare(processing, draw_request(head)))
        [again] = decoder.decode(prepare(processing, draw_request(head, drafts=(first.sentence,))))
        assert again.sentence == first.sentence
        assert (again.stats["forwards"], again.stats["draft_hit"]) == (1, 1.0)
        assert first.stats["forwards"] <= 4


@pytest.mark.parametrize(
    "family", ["qwen3.5", *map(slow, ("lfm2-vl", "qwen2-vl", "gemma3", "internvl", "mistral3", *MIXED))]
)
def test_a_tree_moves_the_scores_by_less_than_a_near_tie(family):
    """Else two tokens could change places without the plain path being asked."""
    loaded, processing = load_tiny(family, seed=1)
    for head in (2, 3):
        shuffle_head(loaded, head, scale=0.2)
        plain, whole = prepare(processing, draw_request(head), draw_request(head, posterior="exact"))
        one_by_one, together = read_scores(loaded, plain, Budget(draft=1, step=1)), read_scores(loaded, whole)
        moved = max(np.ptp(scores - together[node]) for node, scores in one_by_one.items())
        assert moved < tree.NEAR_TIE[torch.float32]


def read_scores(loaded, prepared, budget=None):
    """What the decoder reads: node -> logits of the live tokens."""
    seen = {}

    class RecordingSession(Session):
        def score(self, nodes, hidden):
            scores = super().score(nodes, hidden)
            seen.update(zip(nodes[0].tolist(), scores[0], strict=True))
            return scores

    decoder = TreeDecoder(loaded, budget)
    decoder.session_type = RecordingSession
    decoder.decode([prepared])
    return seen


@pytest.mark.parametrize("decide", ["greedy", "map"])
def test_a_near_tie_is_decided_by_the_plain_path(monkeypatch, decide):
    loaded, processing = load_tiny("qwen2-vl")
    shuffle_head(loaded, 7)
    prepared = prepare(processing, *(draw_request(n, decide=decide) for n in range(3)))
    sure = TreeDecoder(loaded).decode(prepared)
    monkeypatch.setattr(tree, "NEAR_TIE", dict.fromkeys(tree.NEAR_TIE, np.inf))
    tied = TreeDecoder(loaded).decode(prepared)
    assert [each.sentence for each in tied] == [each.sentence for each in sure]
    assert [each.stats["near_tie"] for each in sure + tied] == [0, 0, 0, 1, 1, 1]
    assert all(b.stats["forwards"] > a.stats["forwards"] for a, b in zip(sure, tied, strict=True))


def test_a_near_tie_in_16_bits_is_counted_and_costs_nothing(monkeypatch):
    """The plain path would be another rounding."""
    loaded, processing = share_tiny("qwen2-vl", dtype=torch.bfloat16)
    prepared = prepare(processing, *(draw_request(n) for n in range(3)))
    answers = []
    for bound in (0.0, np.inf):
        monkeypatch.setattr(tree, "NEAR_TIE", dict.fromkeys(tree.NEAR_TIE, bound))
        answers.append(TreeDecoder(loaded).decode(prepared))
    sure, tied = answers
    assert [each.stats for each in tied] == [{**each.stats, "near_tie": 1.0} for each in sure]
    assert [each.sentence for each in tied] == [each.sentence for each in sure]
