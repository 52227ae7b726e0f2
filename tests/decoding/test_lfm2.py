"""What only LFM2-VL has: a state that are some columns alone, and a tower for patches of any grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare, share_tiny, shuffle_head
from tests.slow import slow
from vlm_local.decoding.families import Family
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.types import Picture


@pytest.mark.parametrize("bias", [False, slow(True)])
def test_every_decoder_says_the_same_along_an_episode(bias):
    """On kept KV, with past frames and pictures of two shapes. bias: of the convolutions; no published model has it."""
    loaded, processing = load_tiny("lfm2-vl")
    shuffle_head(loaded, 5, scale=0.2)
    for layer in loaded.model.model.language_model.layers[::2] if bias else ():
        layer.conv.conv.bias = torch.nn.Parameter(torch.linspace(-1, 1, layer.conv.conv.out_channels))
    outlines = OutlinesDecoder(loaded)
    growing, padded = (TreeDecoder(loaded, is_static=is_static) for is_static in (False, True))
    past = [Picture(np.random.default_rng(n).integers(0, 256, (64, 64 + 40 * n, 3), np.uint8)) for n in range(2)]
    options = {"before": "Answer in one phrase. " * 6, "episode": "a", "posterior": "exact"}
    for step in range(4):
        request = draw_request(step, side=64 + 36 * (step % 2), sentences=PHRASES[::60], **options)
        request = replace(request, prompt=replace(request.prompt, earlier=tuple(past[: step // 2])))
        [prepared] = prepare(processing, request)
        [truth] = outlines.decode([prepared])
        for decoder in (growing, padded):
            [answer] = decoder.decode([prepared])
            assert answer.sentence == truth.sentence
            np.testing.assert_allclose(answer.probabilities, truth.probabilities, atol=1e-5)
            assert (answer.stats["reused_tokens"] > 0) == (step > 0)


@pytest.mark.parametrize("shape", [(64, 64), (40, 200), (300, 20)])
def test_pictures_are_encoded_as_transformers_encodes_them(shape):
    """Without their padding, two at once."""
    loaded, processing = share_tiny("lfm2-vl")
    pictures = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
    prepared = prepare(processing, *(replace(draw_request(0), image=each) for each in pictures))
    with torch.inference_mode():
        mine = Family(loaded).encode_images(prepared)
        theirs = [loaded.model.model.get_image_features(**each.vision).pooler_output[0] for each in prepared]
    assert prepared[0].vision["pixel_values"].shape[1] > 4 * len(theirs[0])  # there is padding
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own.tokens, other, atol=1e-5, rtol=1e-4)
    assert (mine[0].tokens - mine[1].tokens).abs().max() > 0.1
