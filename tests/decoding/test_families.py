"""Positions and image features against transformers' own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import draw_request, load_tiny, prepare, share_tiny
from tests.slow import slow
from tests.tiny_models.names import FAMILIES, MIXED, QWEN
from vlm_local.decoding.families import Family
from vlm_local.decoding.prepared import find_layout

# By default those that have a vision tower of their own.
TOWERS = [slow(family) if family in (*MIXED, "paligemma", "smolvlm") else family for family in FAMILIES]


@pytest.mark.parametrize("family", [*QWEN, "glm4v"])
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


@pytest.mark.parametrize("family", TOWERS)
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


@pytest.mark.parametrize("family", TOWERS)
def test_a_vision_tower_that_is_captured_asks_for_no_value(family):
    """On a device whose tensors have no values, and which takes none that lie on the CPU."""
    loaded, processing = load_tiny(family)
    loaded.model.to("meta")
    parts = Family(replace(loaded, device=torch.device("meta")))
    [prepared] = prepare(processing, draw_request(0, side=100))
    layout = find_layout(prepared)
    pixels = torch.zeros(2 * layout.shape[0], *layout.shape[1:], device="meta")
    with torch.inference_mode():
        if not parts.can_capture_vision:
            with pytest.raises(NotImplementedError):
                parts.encode_pixels(pixels, layout, 2)
            return
        for features in parts.encode_pixels(pixels, layout, 2):
            assert len(features.tokens) == int((prepared.input_ids == parts.image_token_id).sum())
