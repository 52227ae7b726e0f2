"""Prompts that show several pictures: their KV is kept by pixels, and nothing changes but the time."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare, share_tiny, shuffle_head
from tests.slow import slow
from tests.tiny_models.names import KEEP_A_STATE, MIXED, MOLMO2, PALIGEMMA
from vlm_local.decoding.families import Family
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.prepared import FeatureStore, ImageFeatures, PreparedPicture
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.errors import RequestError
from vlm_local.types import GenerationRequest, Picture

_SLOW = (*MIXED, "qwen2.5-vl", "smolvlm", "gemma4", "gemma4-31b", "glm4v", "lfm2-vl", "mistral3-small", "molmo2")
CHAT = ["qwen2-vl", "qwen3-vl", "qwen3.5", "smolvlm2", "gemma3", "internvl", "mistral3", *map(slow, _SLOW)]
EXACT = {"posterior": "exact", "sentences": PHRASES[::60], "episode": "r/1"}


def draw_picture(seed: int, height: int = 64, width: int = 64) -> Picture:
    return Picture(np.random.default_rng(1000 + seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def show(request: GenerationRequest, *earlier: str | Picture) -> GenerationRequest:
    return replace(request, prompt=replace(request.prompt, earlier=earlier))


@pytest.mark.parametrize("family", CHAT)
def test_a_kept_prefix_of_pictures_answers_as_the_whole_prompt(family):
    """Frames that come, a picture that changes under the same words, one of another shape, a new first one."""
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 4, scale=0.2)
    a, b, c, wide = draw_picture(1), draw_picture(2), draw_picture(3), draw_picture(4, 64, 128)
    shown = [(a,), (a, b), (a, b), (a, c), (a, "Then:", c, wide), (b, c), ()]
    requests = [
        show(draw_request(step, **EXACT), *(f for each in pictures for f in ("Seen:", each)))
        for step, pictures in enumerate(shown)
    ]
    keeping, reused = TreeDecoder(loaded), []
    for request in requests:
        [kept] = keeping.decode(prepare(processing, request))
        [fresh] = TreeDecoder(loaded).decode(prepare(processing, request))
        assert fresh.stats["reused_tokens"] == 0
        np.testing.assert_allclose(kept.probabilities, fresh.probabilities, atol=1e-5)
        reused.append(kept.stats["reused_tokens"])
    num_tokens = [len(prepare(processing, request)[0].input_ids) for request in requests]
    one_picture = num_tokens[1] - num_tokens[0]
    if family in KEEP_A_STATE:
        assert reused[1] == 0 < one_picture // 2 < reused[2] == reused[3]  # what came again once, as long as it does
        return
    if family in MOLMO2:  # shows pictures first, and all see one another
        assert max(reused) < one_picture // 2 and reused[2] == reused[1] > 0
        return
    assert reused[1] > one_picture // 2 + reused[6] > 0  # the first picture, too
    assert reused[2] > reused[1]  # both
    assert reused[6] < reused[5] < reused[3] < reused[2]  # up to the picture that changed, and no further


@pytest.mark.parametrize("family", ["lfm2-vl", slow("qwen3.5")])
def test_what_comes_before_past_frames_and_the_frames_are_kept_where_a_state_cannot_be_cut(family):
    """An example; frames that come one by one, stay for three steps and are then shifted, twice."""
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 4, scale=0.2)
    example, *frames = (draw_picture(n) for n in range(6))
    keeping, steps = TreeDecoder(loaded), []  # of each step, how many pictures are not read again
    for first, last in [(0, 0), (0, 1), (0, 2), *[(0, 3)] * 3, *[(1, 4)] * 3, *[(2, 5)] * 3]:
        shown = [f for n in range(first, last) for f in (f"{n} steps after the first one:", frames[n])]
        request = show(draw_request(len(steps), **EXACT), "An example of another one:", example, "right", *shown)
        [prepared] = prepare(processing, request)
        [[kept], [fresh]] = keeping.decode([prepared]), TreeDecoder(loaded).decode([prepared])
        np.testing.assert_allclose(kept.probabilities, fresh.probabilities, atol=1e-5)
        is_picture = prepared.input_ids[: int(kept.stats["reused_tokens"])] == loaded.model.config.image_token_id
        steps.append(int(is_picture.sum()) // prepared.earlier[0].num_tokens)
    assert steps == [0, 0, 1, 3, 4, 4, *[1, 4, 4] * 2]


@pytest.mark.parametrize("family", ["qwen2-vl", "molmo2"])
def test_the_vision_tower_sees_each_frame_of_an_episode_once(family, monkeypatch):
    """Two robots, whose last two pictures are shown; the first one alone was not a prompt with frames yet."""
    loaded, processing = share_tiny(family)
    encode, seen = Family.encode_pixels, []

    def count(self, pixels, layout, count, mask=None):
        seen.append(count)
        return encode(self, pixels, layout, count, mask)

    monkeypatch.setattr(Family, "encode_pixels", count)
    decoder, counts = TreeDecoder(loaded, is_static=False), []
    for step in range(5):
        requests = [
            replace(
                show(draw_request(step), *(draw_picture(10 * robot + n) for n in range(max(0, step - 2), step))),
                image=draw_picture(10 * robot + step).pixels,
                episode=f"{robot}",
            )
            for robot in range(2)
        ]
        seen.clear()
        decoder.decode(prepare(processing, *requests))
        counts.append(sum(seen))
    assert counts == [2, 4, 2, 2, 2]


def test_features_that_are_kept_are_bounded():
    one, encoded = ImageFeatures(torch.zeros(2, 4)), []
    pictures = [PreparedPicture(key, 2, {}) for key in range(4)]
    store = FeatureStore(lambda unknown: encoded.extend(unknown) or [one] * len(unknown), 3 * one.nbytes)
    for wanted in ([0, 1, 1, 2], [0], [3, 0, 2], [1], [0, 1, 2, 3]):
        assert len(store.find([pictures[each] for each in wanted])) == len(wanted)
    assert [each.key for each in encoded] == [0, 1, 2, 3, 1, 3]


@pytest.mark.parametrize("family", CHAT)
def test_several_pictures_are_read_as_transformers_reads_them(family):
    """The same tokens as the family's own processor makes of text and pictures, the same answer as the reference's."""
    loaded, processing = share_tiny(family)
    earlier = draw_picture(1), draw_picture(2, 64, 128)
    request = show(draw_request(0, **EXACT), "An example:", earlier[0], "It was: stop", earlier[1])
    [prepared] = prepare(processing, request)
    pictures = [*(each.pixels for each in earlier), request.image]
    text, begin = processing.render(request.prompt), loaded.tokenizer.bos_token
    adds = not (begin and text.startswith(begin))  # as its apply_chat_template
    own = loaded.processor(text=[text], images=[pictures], return_tensors="pt", add_special_tokens=adds)
    assert own["input_ids"][0].tolist() == prepared.input_ids.tolist()
    for name, value in prepared.join_vision().items():
        np.testing.assert_allclose(value, own[name], atol=1e-6)
    [tree] = TreeDecoder(loaded).decode([prepared])
    [reference] = OutlinesDecoder(loaded).decode([prepared])
    assert tree.sentence == reference.sentence
    np.testing.assert_allclose(tree.probabilities, reference.probabilities, atol=1e-5)


@pytest.mark.parametrize("family", PALIGEMMA)
def test_a_family_of_one_picture_refuses_several(family):
    _, processing = share_tiny(family)
    with pytest.raises(RequestError, match="reads one picture"):
        prepare(processing, show(draw_request(0), draw_picture(1)))


def test_fixed_buffers_are_left_where_earlier_pictures_must_be_read():
    loaded, processing = share_tiny("qwen2-vl")
    static = TreeDecoder(loaded, is_static=True)
    for step in range(3):
        request = show(draw_request(step, **EXACT), draw_picture(1), draw_picture(2))
        [answer] = static.decode(prepare(processing, request))
        [growing] = TreeDecoder(loaded, is_static=False).decode(prepare(processing, request))
        np.testing.assert_allclose(answer.probabilities, growing.probabilities, atol=1e-5)
    assert static.metadata["graphs"]["eager_pictures"] == 1 and answer.stats["reused_tokens"] > 0


def test_rows_with_other_numbers_of_pictures_share_a_forward():
    loaded, processing = load_tiny("qwen3-vl")
    shuffle_head(loaded, 5)
    requests = [
        show(draw_request(row, **{**EXACT, "episode": f"{row}"}), *(draw_picture(10 * row + n) for n in range(row)))
        for row in range(3)
    ]
    decoder = TreeDecoder(loaded)
    decoder.decode(prepare(processing, requests[2]))
    together = decoder.decode(prepare(processing, *requests))
    for request, answer in zip(requests, together, strict=True):
        [alone] = TreeDecoder(loaded).decode(prepare(processing, request))
        np.testing.assert_allclose(answer.probabilities, alone.probabilities, atol=1e-5)
