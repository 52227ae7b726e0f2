"""KV kept between steps: of the text before the image only, under its own episode only, and bounded."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare, share_tiny, shuffle_head
from tests.slow import FAMILIES, slow
from tests.tiny_models.names import KEEP_A_STATE, KEEP_NOTHING, MOLMO2
from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import Kept
from vlm_local.decoding.session import PrefixStore, count_reusable
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.types import Prompt

EXACT = {"posterior": "exact", "sentences": PHRASES[::5], "episode": "r/1"}


def change_before(request, before):
    return replace(request, prompt=Prompt(before, request.prompt.after))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_episode_answers_as_if_nothing_were_kept(family):
    """Other images, other instructions, a history that grows, a changed first byte, a shorter text."""
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 4, scale=0.2)
    long = "Rules. move forward left, tilt up"
    texts = ["Rules.", "Rules.", long, f"{long}; stop", f"{long}; stop".lower(), "R", "Rules. move", ""]
    requests = [change_before(draw_request(n, side=64 + 16 * (n % 2), **EXACT), text) for n, text in enumerate(texts)]
    keeping, reused = TreeDecoder(loaded), []
    for request in requests:
        [kept] = keeping.decode(prepare(processing, request))
        [fresh] = TreeDecoder(loaded).decode(prepare(processing, request))
        assert kept.sentence == fresh.sentence and fresh.stats["reused_tokens"] == 0
        np.testing.assert_allclose(kept.probabilities, fresh.probabilities, atol=1e-5)
        reused.append(kept.stats["reused_tokens"])
    assert reused[0] == 0 and (any(reused) is (family not in KEEP_NOTHING))
    if family in KEEP_A_STATE:
        assert reused[1] > 0 == reused[2]  # all of the same text, nothing of one that differs at its end
    elif family in MOLMO2:
        assert set(reused[1:]) == {1}  # the picture comes first
    elif any(reused):
        assert reused[3] > reused[1] > 0  # what was there before is used, what is new is read
        assert reused[4] < reused[1]  # up to the changed byte and no further


@pytest.mark.parametrize("family", ["lfm2-vl", slow("qwen3.5")])
def test_a_state_serves_a_text_that_changed_and_one_that_stays(family):
    """The same rules throughout, then a note: of the second one, first the rules alone are kept, then all of it."""
    loaded, processing = share_tiny(family)
    decoder, reused, num_before = TreeDecoder(loaded), [], []
    for note in ("go left", "turn right", "turn right", "turn right", "close"):
        [prepared] = prepare(processing, change_before(draw_request(0, **EXACT), f"Answer in one phrase. Last: {note}"))
        [answer] = decoder.decode([prepared])
        reused.append(answer.stats["reused_tokens"])
        num_before.append(count_reusable(Family(loaded), prepared))
    rules = reused[2]
    assert 0 < rules < num_before[3] - 4 and reused == [0, 0, rules, num_before[3], rules]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_images_under_the_same_text_never_mix(family):
    """The same words, episode and image size; only pixels differ. Their answers must, and as before."""
    loaded, processing = share_tiny(family)
    first, second = draw_request(1, **EXACT), draw_request(1, **EXACT)
    second = replace(second, image=255 - second.image)
    decoder = TreeDecoder(loaded)
    mixed = [decoder.decode(prepare(processing, each))[0].probabilities for each in (first, second, first, second)]
    alone = [TreeDecoder(loaded).decode(prepare(processing, each))[0].probabilities for each in (first, second)]
    assert np.abs(alone[0] - alone[1]).max() > 1e-4
    np.testing.assert_allclose(mixed, alone * 2, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_at_or_behind_an_image_token_is_ever_stored(family):
    loaded, processing = share_tiny(family)
    [prepared] = prepare(processing, draw_request(0, episode="a"))
    image_id = loaded.model.config.image_token_id
    greedy = replace(prepared, before_length=len(prepared.input_ids))  # a claim that is wrong
    decoder = TreeDecoder(loaded)
    decoder.decode([greedy])
    [kept] = [entry.keys for entry in decoder._store._entries.values()] or [np.array([])]
    assert image_id not in kept
    first_image = int((prepared.input_ids == image_id).int().argmax())
    first_image -= family in MOLMO2  # the mark before it sees it, too
    assert len(kept) == (0 if family in KEEP_NOTHING else first_image) == count_reusable(Family(loaded), greedy)


def test_stored_kv_is_the_text_alone():
    """What is kept after a step equals the KV of the text read without any image behind it."""
    loaded, processing = share_tiny("qwen2-vl")
    [prepared] = prepare(processing, draw_request(0, episode="a"))
    decoder = TreeDecoder(loaded)
    decoder.decode([prepared])
    kept, _ = decoder._store.find("a", prepared.input_ids.numpy())
    with torch.inference_mode():
        text = loaded.model(input_ids=prepared.input_ids[None, : prepared.before_length], use_cache=True)
    for (keys, values), layer in zip(kept.kv[0], text.past_key_values.layers, strict=True):
        torch.testing.assert_close(keys, layer.keys[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(values, layer.values[0], atol=1e-4, rtol=0)


def test_episodes_do_not_share_and_forget_drops():
    loaded, processing = share_tiny("qwen2-vl")
    decoder = TreeDecoder(loaded)

    def count_reused(episode):
        return decoder.decode(prepare(processing, draw_request(0, episode=episode)))[0].stats["reused_tokens"]

    assert [count_reused(each) for each in ("a", "b", None, None)] == [0, 0, 0, 0]
    assert count_reused("a") > 0
    decoder.forget("a")
    decoder.forget("never seen")
    assert count_reused("a") == 0 and count_reused("b") > 0


def test_a_ragged_batch_reuses_for_some_of_its_rows():
    loaded, processing = load_tiny("qwen2-vl")
    shuffle_head(loaded, 5)
    requests = [
        change_before(draw_request(n, **{**EXACT, "episode": key}), text)
        for n, (key, text) in enumerate(
            [("a", "Long rules for all."), ("b", "Short."), (None, "None kept."), ("c", "")]
        )
    ]
    decoder = TreeDecoder(loaded)
    decoder.decode(prepare(processing, *requests[:2]))
    together = decoder.decode(prepare(processing, *requests))
    assert [each.stats["reused_tokens"] > 0 for each in together] == [True, True, False, False]
    for request, answer in zip(requests, together, strict=True):
        [alone] = TreeDecoder(loaded).decode(prepare(processing, request))
        np.testing.assert_allclose(alone.probabilities, answer.probabilities, atol=1e-5)


def build_kept(count):
    return Kept((torch.zeros(1, 2, 1, count, 2),))


def test_the_store_is_bounded_and_drops_the_least_recently_used():
    store, ids = PrefixStore(max_bytes=3 * 16 * 10), np.arange(10)
    for episode in "abc":
        store.keep(episode, ids, build_kept(10))
    assert store.num_bytes == 3 * 160
    store.find("a", ids)
    store.keep("d", ids, build_kept(10))
    assert [store.find(each, ids)[0] is not None for each in "abcd"] == [True, False, True, True]
    assert store.num_bytes == 3 * 160
    store.keep("huge", np.arange(100), build_kept(100))
    assert store.num_bytes <= 3 * 160 and store.find("huge", ids) == (None, 0)


def test_the_store_gives_what_begins_alike():
    store = PrefixStore(1 << 20)
    store.keep("a", np.array([1, 2, 3, 4]), build_kept(4))

    def count(*ids):
        kept, _ = store.find("a", np.array(ids, dtype=int))
        return kept.num_columns if kept else 0

    assert [count(1, 2, 3, 4), count(1, 2, 3, 4, 5), count(1, 2), count(1, 9, 3, 4), count(9), count()] == [
        4,
        4,
        2,
        1,
        0,
        0,
    ]
    assert store.find(None, np.array([1])) == (None, 0)
