"""What the model says to a blank picture, taken out: no constant preference is left, in every decoder."""

from dataclasses import replace

import numpy as np
import pytest

from tests.decoding.tiny import PHRASES, bias_tree, draw_request, load_tiny, prepare, share_tiny, shuffle_head
from tests.slow import slow
from tests.tiny_models.names import FAMILIES as ALL
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.engines.blank import BlankReadings
from vlm_local.engines.hf import DefaultDecoder
from vlm_local.types import Prompt

BLANK = Prompt("Answer in one phrase.", "put the spoon on the towel")
SOME = PHRASES[::27]
CUT = ("clos", "close gripper", "stop")  # no trie: outlines decodes it
BIAS = 3.0


def ask(seed, **options):
    return draw_request(seed, **{"blank": BLANK, "sentences": SOME, "contrast": 1.0, **options})


def answer(decoder, processing, *requests):
    """What an engine does with requests: a blank picture read for each, then all together."""
    blanks = BlankReadings(processing.prepare, decoder)
    return decoder.decode([blanks.add_to(each) for each in prepare(processing, *requests)])


def bias_outputs(loaded, token):
    """A constant on a token's logit as the model itself gives it, behind whatever bounds its logits."""

    def add(module, inputs, output):
        output.logits[..., token] += BIAS

    return loaded.model.register_forward_hook(add)


def list_live_tokens(loaded, processing):
    words = {word for phrase in SOME for word in loaded.tokenizer(phrase, add_special_tokens=False)["input_ids"]}
    return [*sorted(words), loaded.eos_token_id]


@pytest.mark.parametrize(
    ("family", "is_static"),
    [("qwen2-vl", False), ("paligemma2", True)]
    + [slow(family, is_static) for family in ALL for is_static in (False, True)],
)
def test_a_constant_on_a_tokens_logit_changes_nothing_at_one(family, is_static):
    """Tokens of the whole grammar, the end token included."""
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 1, scale=0.3)
    plain = TreeDecoder(loaded, is_static=is_static)
    live = list_live_tokens(loaded, processing)
    requests = [
        ask(3, posterior="exact"),
        ask(3, posterior="exact", decide="map", episode="a"),
        ask(3, posterior="exact", decide="sample", uniform=0.6, temperature=1.7),
        ask(4, posterior="exact"),
    ]
    truth = answer(plain, processing, *requests)
    [without] = answer(plain, processing, ask(3, posterior="exact", contrast=0.0))
    num_moved = 0
    for token in live[:: max(1, len(live) // 8)]:
        biased = bias_tree(TreeDecoder(loaded, is_static=is_static), token, BIAS)
        for mine, theirs in zip(answer(biased, processing, *requests), truth, strict=True):
            assert mine.sentence == theirs.sentence
            np.testing.assert_allclose(mine.probabilities, theirs.probabilities, atol=1e-5)
        [moved] = answer(biased, processing, ask(3, posterior="exact", contrast=0.0))
        num_moved += np.abs(moved.probabilities - without.probabilities).max() > 1e-3
    assert num_moved  # many never had an alternative


@pytest.mark.parametrize("family", ["qwen2-vl", *map(slow, ("paligemma2", "qwen3-vl", "smolvlm2", "gemma3"))])
def test_the_reference_gives_the_same_contrasted_distribution(family):
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 2, scale=0.3)
    for alpha in (0.5, 1.0):
        options = {"contrast": alpha, "sentences": PHRASES[::81]}
        requests = [
            ask(1, posterior="exact", **options),
            ask(2, decide="map", **options),
            *(ask(2, decide="sample", uniform=u, temperature=2.0, **options) for u in (0.1, 0.5, 0.9)),
        ]
        fast, truth = (answer(kind(loaded), processing, *requests) for kind in (TreeDecoder, OutlinesDecoder))
        assert [each.sentence for each in fast] == [each.sentence for each in truth]
        np.testing.assert_allclose(fast[0].probabilities, truth[0].probabilities, atol=1e-5)
        assert fast[0].probabilities.sum() == pytest.approx(1)


def test_it_is_the_formula_over_a_nodes_children():
    """By hand on a grammar whose sentences are one token each, so that they are children of one node."""
    loaded, processing = share_tiny("qwen2-vl")
    [with_picture, blank] = (
        TreeDecoder(loaded).decode(prepare(processing, request))[0].probabilities
        for request in (
            ask(1, sentences=("a", "b", "c"), contrast=0.0, posterior="exact"),
            replace(ask(1, sentences=("a", "b", "c"), contrast=0.0, posterior="exact"), prompt=BLANK, image=grey()),
        )
    )
    for alpha in (0.5, 2.0):
        [said] = answer(
            TreeDecoder(loaded), processing, ask(1, sentences=("a", "b", "c"), contrast=alpha, posterior="exact")
        )
        expected = with_picture / blank**alpha
        np.testing.assert_allclose(said.probabilities, expected / expected.sum(), atol=1e-6)


def grey():
    return np.full((64, 64, 3), 127, np.uint8)


def test_the_reference_takes_a_constant_out_where_there_is_no_trie():
    loaded, processing = load_tiny("qwen2-vl")
    request = ask(1, sentences=CUT, posterior="exact")
    [truth] = answer(DefaultDecoder(loaded), processing, request)
    for token in {ids[0] for ids in loaded.tokenizer(list(CUT), add_special_tokens=False)["input_ids"]}:
        hook = bias_outputs(loaded, token)
        [biased] = answer(DefaultDecoder(loaded), processing, request)
        [plain] = answer(DefaultDecoder(loaded), processing, replace(request, contrast=0.0))
        hook.remove()
        assert biased.sentence == truth.sentence
        np.testing.assert_allclose(biased.probabilities, truth.probabilities, atol=1e-5)
        assert np.abs(plain.probabilities - truth.probabilities).max() > 1e-3


def test_a_blank_picture_is_read_once_for_an_instruction_and_few_are_kept(monkeypatch):
    monkeypatch.setattr("vlm_local.engines.blank.MAX_BLANKS", 2)
    loaded, processing = share_tiny("qwen2-vl")
    asked = []
    blanks = BlankReadings(lambda request: asked.append(request) or processing.prepare(request), TreeDecoder(loaded))
    words = ["one", "one", "two", "one", "three", "one", "two"]
    for seed, word in enumerate(words):
        request = ask(seed, blank=replace(BLANK, after=word))
        assert blanks.add_to(processing.prepare(request)).blank_log is not None
    assert [request.prompt.after for request in asked] == ["one", "two", "three", "two"]
    assert all((request.image == request.image[0, 0, 0]).all() and request.contrast == 0 for request in asked)
