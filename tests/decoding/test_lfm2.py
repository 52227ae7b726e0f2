"""What only LFM2-VL has: a state that are some columns alone, and a tower for patches of any grid."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import check_along_an_episode, draw_request, load_tiny, prepare, share_tiny
from tests.slow import slow
from vlm_local.decoding.families import Family


@pytest.mark.parametrize("bias", [False, slow(True)])
def test_every_decoder_says_the_same_along_an_episode(bias):
    """bias: of the convolutions; no published model has it."""
    loaded, processing = load_tiny("lfm2-vl")
    for layer in loaded.model.model.language_model.layers[::2] if bias else ():
        layer.conv.conv.bias = torch.nn.Parameter(torch.linspace(-1, 1, layer.conv.conv.out_channels))
    check_along_an_episode(loaded, processing, (0, 0, 1, 1), before="Answer in one phrase. " * 6)


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
