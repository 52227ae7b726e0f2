"""What only Gemma 4 has: KV of two shapes, layers that read the KV of others, tokens embedded once more for each layer,
pictures with padding, weights for sounds.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import check_along_an_episode, draw_request, load_tiny, prepare, share_tiny
from tests.slow import slow
from tests.tiny_models import tiny_checkpoint
from tests.tiny_models.names import GEMMA4
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.families import Family
from vlm_local.engines.loading import load_model
from vlm_local.weights import count_weights


@pytest.mark.parametrize("family", ["gemma4", *map(slow, ("gemma4-31b", "gemma4-26b"))])
def test_every_decoder_says_the_same_along_an_episode(family):
    """In the larger models each picture is a block that is longer than the window."""
    check_along_an_episode(*load_tiny(family), (0, 0, 1, 1))


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
