"""What only Molmo2 has: a picture that is read twice, pictures that see one another, features added to embeddings."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import check_along_an_episode, draw_request, load_tiny, prepare, share_tiny
from tests.slow import slow
from tests.tiny_models import tiny_checkpoint
from vlm_local.decoding.families import Family
from vlm_local.decoding.views import list_pooled
from vlm_local.engines.processing import Processing
from vlm_local.engines.processors import load_processor
from vlm_local.types import Picture

_TOKENS = ["<low_res_im_start>", *["<im_patch>"] * 9, "<im_end>"]
_TOKENS += ["<im_start>", *[*["<im_patch>"] * 3, "<im_col>"] * 3, "<im_end>"]


@pytest.mark.parametrize("family", ["molmo2", slow("molmo2-o")])
def test_every_decoder_says_the_same_along_an_episode(family):
    """With past frames, whose KV a later picture changes: nothing of it is kept, and a step has no less to read."""
    check_along_an_episode(*load_tiny(family), range(3))


def test_pictures_are_encoded_as_transformers_encodes_them():
    loaded, processing = share_tiny("molmo2")
    several = prepare(processing, *(draw_request(seed) for seed in range(2)))
    placeholder = loaded.model.get_input_embeddings().weight[loaded.model.config.image_token_id]
    with torch.inference_mode():
        for prepared, mine in zip(several, Family(loaded).encode_images(several), strict=True):
            vision = {name: value for name, value in prepared.vision.items() if name != "mm_token_type_ids"}
            [theirs] = loaded.model.model.get_image_features(**vision).pooler_output
            torch.testing.assert_close(mine.tokens, theirs + placeholder, atol=1e-5, rtol=1e-4)


def test_a_token_at_the_edge_pools_the_patches_that_there_are():
    assert list_pooled(3, 3, 2, 2).tolist() == [[0, 1, 3, 4], [2, -1, 5, -1], [6, 7, -1, -1], [8, -1, -1, -1]]
    assert list_pooled(2, 4, 3, 3).tolist() == [[-1, 0, 1, -1, 4, 5, -1, -1, -1], [2, 3, -1, 6, 7, -1, -1, -1, -1]]


def test_a_picture_is_resized_without_smoothing_and_shown_twice():
    """At half its size a pixel is the mean of four, to the whole number; patches and their pixels go row by row."""
    _, processing = share_tiny("molmo2")
    image = np.random.default_rng(0).integers(0, 256, (140, 140, 3), np.uint8)
    [prepared] = prepare(processing, replace(draw_request(0), image=image))
    means = np.round(image.reshape(70, 2, 70, 2, 3).mean((1, 3)))
    patches = means.reshape(5, 14, 5, 14, 3).swapaxes(1, 2).reshape(25, -1) / 127.5 - 1
    np.testing.assert_allclose(prepared.vision["pixel_values"], [patches] * 2, atol=1e-6)


def test_a_prompt_has_the_marks_that_the_folder_asks_for(tmp_path):
    loaded, processing = share_tiny("molmo2")
    [prepared] = prepare(processing, draw_request(0))
    ids = loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", *_TOKENS, "<|im_start|>"])
    assert prepared.input_ids[: len(ids)].tolist() == ids
    request = draw_request(0)
    [several] = prepare(processing, replace(request, prompt=replace(request.prompt, earlier=(Picture(request.image),))))
    for each, count in ((prepared, 1), (several, 2)):
        shown = each.input_ids[each.vision["mm_token_type_ids"][0] == 1]
        assert loaded.tokenizer.convert_ids_to_tokens(shown.tolist()) == _TOKENS * count
    folder = shutil.copytree(tiny_checkpoint("molmo2"), tmp_path / "model")
    file = folder / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_use_col_tokens": False}))
    [plain] = prepare(Processing(load_processor(folder, "molmo2"), "molmo2", torch.float32), draw_request(0))
    assert len(prepared.input_ids) - len(plain.input_ids) == _TOKENS.count("<im_col>")


def test_a_template_that_begins_the_text_itself_is_left_to_it(tmp_path):
    folder = shutil.copytree(tiny_checkpoint("molmo2"), tmp_path / "model")
    file = folder / "chat_template.json"
    file.write_text(file.read_text().replace("{% set", "{{ bos_token }}{% set", 1))
    mine = Processing(load_processor(folder, "molmo2"), "molmo2", torch.float32)
    _, others = share_tiny("molmo2")
    earlier = draw_request(0)
    earlier = replace(earlier, prompt=replace(earlier.prompt, earlier=(Picture(earlier.image),)))
    for request in (draw_request(0), earlier):
        one, other = (prepare(each, request)[0].input_ids.tolist() for each in (mine, others))
        assert one == other
