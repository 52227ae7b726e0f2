"""Forwards in fixed shapes say what forwards that grow say, for every family: without a GPU, uncaptured."""

import numpy as np
import pytest

from tests.decoding.tiny import PHRASES, draw_request, prepare, share_tiny
from tests.slow import FAMILIES, slow
from vlm_local.decoding import session, static
from vlm_local.decoding.static import round_up
from vlm_local.decoding.tree import TreeDecoder

EXACT = {"posterior": "exact", "sentences": PHRASES[::7]}


def decode_both(family, batches):
    """For each batch: answers of padded forwards, answers of growing ones."""
    loaded, processing = share_tiny(family)
    padded, growing = TreeDecoder(loaded, is_static=True), TreeDecoder(loaded, is_static=False)
    for requests in batches:
        yield from zip(
            padded.decode(prepare(processing, *requests)),
            growing.decode(prepare(processing, *requests)),
            strict=True,
        )


def check(pairs):
    for mine, theirs in pairs:
        assert mine.sentence == theirs.sentence
        assert mine.stats == theirs.stats
        if theirs.probabilities is not None:
            np.testing.assert_allclose(mine.probabilities, theirs.probabilities, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_equals_growing(family):
    """An episode on kept KV, pictures of two sizes, other words, drafts that miss; then another episode."""
    steps = [draw_request(n, side=64 + 36 * (n % 2), episode="a", drafts=PHRASES[n : 2 * n], **EXACT) for n in range(4)]
    check(decode_both(family, [[step] for step in (*steps, draw_request(4, **EXACT))]))


@pytest.mark.parametrize("family", FAMILIES)
def test_robots_of_several_lengths_share_a_padded_forward(family):
    """Three rows in a buffer of four; they end one after the other."""
    batch = [
        draw_request(0, episode="a", **EXACT),
        draw_request(1, before="Another text, and a longer one.", episode="b", posterior="fast"),
        draw_request(2, sentences=("yes", "no")),
    ]
    check(decode_both(family, [batch, batch[::-1], batch[:2]]))


def test_what_no_buffer_holds_grows(monkeypatch):
    requests = [draw_request(n, decide="map", **EXACT) for n in range(3)]
    monkeypatch.setattr(static, "MAX_ROWS", 2)
    check(decode_both("qwen2-vl", [requests]))
    monkeypatch.setattr(static, "MAX_COLUMNS", 16)
    check(decode_both("qwen2-vl", [requests[:1]]))


def count_left(requests, family="qwen2-vl"):
    """How many of these requests, one after another, had no buffer or left it; each says what a growing one says."""
    loaded, processing = share_tiny(family)
    padded, growing = TreeDecoder(loaded, is_static=True), TreeDecoder(loaded, is_static=False)
    for request in requests:
        [prepared] = prepare(processing, request)
        check(zip(padded.decode([prepared]), growing.decode([prepared]), strict=True))
    graphs = padded.metadata["graphs"]
    return graphs["eager_size"] + graphs["grown"]


def test_a_buffer_that_is_full_hands_over_to_one_that_grows(monkeypatch):
    """No column is reserved for nodes, so a few forwards use up what the rounding left."""
    monkeypatch.setattr(session, "RESERVE", 0)
    monkeypatch.setattr(static, "WIDTH", 32)
    requests = [draw_request(n, before="Answer. " * n, episode="a", posterior="fast") for n in range(4)]
    assert count_left(requests)
    check(decode_both("qwen2-vl", [requests[:2], requests[2:]]))


@pytest.mark.parametrize("family", ["lfm2-vl", slow("qwen3.5")])
def test_nodes_follow_the_state_behind_a_long_text_that_is_kept(family):
    """Longer than all that is read behind it, as the shipped prompt is."""
    text = "Answer in one phrase. " * 8
    steps = [draw_request(n, side=64 + 36 * (n % 2), before=text, episode="a", **EXACT) for n in range(3)]
    check(decode_both(family, [[step] for step in steps]))


@pytest.mark.parametrize("slots", [100, slow(40)])  # enough for the first forward of a prompt, and not even for that
def test_a_state_without_room_for_more_nodes_goes_on_growing(monkeypatch, slots):
    monkeypatch.setattr(static, "SLOTS", slots)
    requests = [draw_request(n, episode="a", posterior="fast", sentences=PHRASES) for n in range(3)]
    assert count_left(requests, "qwen3.5")
    check(decode_both("qwen3.5", [requests[:2], requests[2:]]))


def test_a_buffer_need_not_hold_what_pads_its_chunks(monkeypatch):
    """A chunk of over 64 tokens is padded to a multiple of 64: past the end of most buffers of a multiple of 16."""
    monkeypatch.setattr(static, "WIDTH", 16)
    requests = [draw_request(n, before="Answer. " * n, episode="a", **EXACT) for n in range(8)]
    assert not count_left(requests)


def test_a_buffer_holds_all_nodes_that_an_exact_posterior_reads():
    """Not those after which only one token may follow, which are most."""
    assert not count_left([draw_request(0, posterior="exact", sentences=PHRASES)])


def test_lengths_are_few():
    for rows, number in ((1, 13), (4, 6)):
        lengths = {round_up(count, rows) for count in range(1, 1025)}
        assert len(lengths) == number and all(round_up(length, rows) == length for length in lengths)
        assert all(count <= round_up(count, rows) < 2 * count + 128 for count in range(1, 3000))


def test_pictures_of_many_shapes_take_no_more_memory(monkeypatch):
    monkeypatch.setattr(static, "MAX_CAPTURED", 2)
    check(decode_both("qwen2-vl", [[draw_request(n, side=56 + 28 * n)] for n in range(4)]))
