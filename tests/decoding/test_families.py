"""Positions and image features against transformers' own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import draw_request, prepare, share_tiny
from tests.tiny_models import FAMILIES, QWEN
from vlm_local.decoding.families import Family


@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("shape", [(64, 64), (200, 90), (40, 333)])
def test_positions_are_those_of_transformers(family, shape):
    loaded, processing = share_tiny(family)
    request = replace(draw_request(0), image=np.zeros((*shape, 3), np.uint8))
    [prepared] = prepare(processing, request)
    positions, behind = Family(loaded).position_prompt(prepared)
    theirs, delta = loaded.model.model.get_rope_index(
        prepared.input_ids[None], prepared.vision["mm_token_type_ids"], prepared.vision["image_grid_thw"]
    )
    np.testing.assert_array_equal(positions, theirs[:, 0].numpy())
    assert behind == len(prepared.input_ids) + int(delta)


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_several_sizes_are_encoded_as_each_alone(family):
    loaded, processing = share_tiny(family)
    prepared = prepare(processing, *(draw_request(n, side=side) for n, side in enumerate((64, 120, 64, 200))))
    parts = Family(loaded)
    with torch.inference_mode():
        together = parts.encode_images(prepared)
        for each, features in zip(prepared, together, strict=True):
            [alone] = parts.encode_images([each])
            assert len(features.tokens) == int((each.input_ids == parts.image_token_id).sum())
            torch.testing.assert_close(features.tokens, alone.tokens, atol=1e-5, rtol=1e-4)
            for level, its in zip(features.deep, alone.deep, strict=True):
                torch.testing.assert_close(level, its, atol=1e-5, rtol=1e-4)
    assert bool(together[0].deep) is family.startswith("qwen3-vl")
