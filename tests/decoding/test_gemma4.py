"""What only Gemma 4 has: KV of two shapes, layers that read the KV of others, tokens embedded once more for each layer,
pictures with padding, weights for sounds.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare, share_tiny, shuffle_head
from tests.slow import slow
from tests.tiny_models import tiny_checkpoint
from tests.tiny_models.names import GEMMA4
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.families import Family
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.engines.loading import load_model
from vlm_local.types import Picture
from vlm_local.weights import count_weights


@pytest.mark.parametrize("family", ["gemma4", *map(slow, ("gemma4-31b", "gemma4-26b"))])
def test_every_decoder_says_the_same_along_an_episode(family):
    """On kept KV, with past frames and pictures of two shapes; in the larger models each picture is a block that is
    longer than the window.
    """
    loaded, processing = load_tiny(family)
    shuffle_head(loaded, 5, scale=0.2)
    outlines = OutlinesDecoder(loaded)
    growing, padded = (TreeDecoder(loaded, is_static=is_static) for is_static in (False, True))
    past = [Picture(np.random.default_rng(n).integers(0, 256, (64, 64 + 40 * n, 3), np.uint8)) for n in range(2)]
    options = {"episode": "a", "posterior": "exact", "sentences": PHRASES[::60]}
    for step in range(4):
        request = draw_request(step, side=64 + 36 * (step % 2), **options)
        request = replace(request, prompt=replace(request.prompt, earlier=tuple(past[: step // 2])))
        [prepared] = prepare(processing, request)
        [truth] = outlines.decode([prepared])
        for decoder in (growing, padded):
            [answer] = decoder.decode([prepared])
            assert answer.sentence == truth.sentence
            np.testing.assert_allclose(answer.probabilities, truth.probabilities, atol=1e-5)
            assert (answer.stats["reused_tokens"] > 0) == (step > 0)


@pytest.mark.parametrize("family", GEMMA4[:2])
@pytest.mark.parametrize("shape", [(64, 64), (40, 200)])
def test_pictures_are_encoded_as_transformers_encodes_them(family, shape):
    loaded, processing = share_tiny(family)
    [prepared] = prepare(processing, replace(draw_request(0), image=np.full((*shape, 3), 90, np.uint8)))
    vision = {name: value for name, value in prepared.vision.items() if name != "mm_token_type_ids"}
    with torch.inference_mode():
        [mine] = Family(loaded).encode_images([prepared])
        [theirs] = loaded.model.model.get_image_features(**vision).pooler_output
    assert vision["pixel_values"].shape[1] > 9 * len(theirs)  # there is padding
    torch.testing.assert_close(mine.tokens, theirs, atol=1e-5, rtol=1e-4)


def test_weights_for_sounds_are_not_loaded():
    checkpoint = open_checkpoint(tiny_checkpoint("gemma4"))
    model = load_model(checkpoint).model
    names = [name for name, _ in model.named_parameters()]
    assert any("embed_vision" in name for name in names) and not any("audio" in name for name in names)
    stored = [*model.parameters(), *(tensor for name, tensor in model.named_buffers() if name in model.state_dict())]
    assert sum(count_weights(checkpoint.folder)) == sum(tensor.numel() for tensor in stored)
