"""What only Mistral's folders have: a system prompt of their own, files in two formats, pictures in rows."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.hearing import differ
from tests.tiny_models import edit_json, tiny_checkpoint
from tests.tiny_models.names import MISTRAL
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.families import Family
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.engines.processors import load_processor
from vlm_local.errors import ConfigError
from vlm_local.types import GenerationRequest, Prompt

LLAMAS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_checkpoint("mistral3"), tmp_path / "model")


def _prepare(folder, shape=(256, 256), prompt=Prompt("Look:", "open the drawer")):
    processing = Processing(load_processor(folder, "mistral3"), "mistral3", torch.float32)
    request = GenerationRequest(np.zeros((*shape, 3), np.uint8), prompt, ("yes", "no"))
    return processing.prepare(request), processing.render(prompt)


@pytest.mark.parametrize(("shape", "rows", "columns"), [((256, 256), 10, 10), ((480, 640), 18, 23), ((20, 90), 1, 4)])
def test_a_picture_is_read_once_row_by_row_and_not_enlarged(shape, rows, columns):
    prepared, _ = _prepare(tiny_checkpoint("mistral3"), shape)
    tokenizer = load_processor(tiny_checkpoint("mistral3"), "mistral3").tokenizer
    text = tokenizer.decode(prepared.input_ids)
    lines = ["[IMG]" * columns] * rows
    assert "[IMG_BREAK]".join(lines) + "[IMG_END]" in text and text.count("[IMG]") == rows * columns
    assert text.count("<s>") == 1  # of the template, not of the tokenizer as well
    assert prepared.vision["pixel_values"].shape == (1, 3, 28 * rows, 28 * columns)


def test_the_system_prompt_of_a_chat_program_is_left_out_and_a_labs_own_is_not(folder):
    _, text = _prepare(folder)
    assert text == "<s>[INST]Look:\n[IMG]\nopen the drawer[/INST]"
    file = folder / "chat_template.json"
    edit_json(
        file, chat_template=json.loads(file.read_text())["chat_template"].replace("made by Mistral AI", "a robot")
    )
    assert _prepare(folder)[1].startswith("<s>[SYSTEM_PROMPT]You were a robot in Paris. Today is 2")


@pytest.mark.slow
def test_words_are_split_as_the_model_learnt_them(folder):
    """Many published files split them as Llama's do: 'move becomes 'm and ove. A small vocabulary is not looked at."""
    right, _ = _prepare(folder, prompt=Prompt("Look:", "'move' it"))
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"unused{number}": number for number in range(len(vocabulary), 100_001)}
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = LLAMAS
    file.write_text(json.dumps(content))
    edit_json(folder / "config.json", transformers_version="4.57.1")
    mended, _ = _prepare(folder, prompt=Prompt("Look:", "'move' it"))
    assert mended.input_ids.tolist() == right.input_ids.tolist()
    edit_json(folder / "config.json", transformers_version="5.1.0")  # of this version transformers believes the file
    wrong, _ = _prepare(folder, prompt=Prompt("Look:", "'move' it"))
    assert wrong.input_ids.tolist() != right.input_ids.tolist()


def test_files_in_mistrals_own_format_change_nothing(folder):
    for name in ("consolidated.safetensors", "params.json", "tekken.json"):
        (folder / name).write_text("{}")
    assert differ(folder, tiny_checkpoint("mistral3")) == 0


@pytest.mark.parametrize(
    ("file", "changes", "told"),
    [
        ("processor_config.json", {"patch_size": None}, r"patch_size is 16 .* config\.json has patch_size 14"),
        ("processor_config.json", {"spatial_merge_size": 1}, r"spatial_merge_size is 1 .* has spatial_merge_size 2"),
        ("config.json", {"vision_feature_layer": -2}, r"vision_feature_layer -2, but .* \(null and -1\)"),
    ],
)
def test_what_is_not_read_as_the_model_has_it_is_refused(file, changes, told, folder):
    edit_json(folder / file, **changes)
    with pytest.raises(ConfigError, match=told):
        load_model(open_checkpoint(folder))


def test_a_window_over_all_layers_is_refused(folder):
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit_json(folder / "config.json", text_config=text | {"sliding_window": 16})
    with pytest.raises(ConfigError, match="sliding_window is 16"):
        load_model(open_checkpoint(folder))


@pytest.mark.parametrize("family", MISTRAL)
def test_pictures_of_a_batch_do_not_see_one_another(family):
    """transformers puts them all into one row, with a mask between them."""
    loaded = load_model(open_checkpoint(tiny_checkpoint(family)))
    processing = Processing(loaded.processor, loaded.family, torch.float32)
    draw = np.random.default_rng(0).integers
    request = GenerationRequest(np.zeros((1, 1, 3), np.uint8), Prompt("", "go"), ("yes",))
    shapes = ((64, 64), (30, 140), (64, 64))
    prepared = [processing.prepare(replace(request, image=draw(0, 256, (*each, 3), np.uint8))) for each in shapes]
    own = loaded.processor(text=["[IMG]" * 3], images=[[each.request.image for each in prepared]], return_tensors="pt")
    with torch.inference_mode():
        mine = Family(loaded).encode_images(prepared)
        theirs = loaded.model.model.get_image_features(own["pixel_values"], own["image_sizes"]).pooler_output
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.tokens, other, atol=2e-5, rtol=1e-4)
