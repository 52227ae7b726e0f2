"""Weights served are exactly those of the folder: quantised ones by its own word, no tensor left over."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from tests.hearing import differ, hear, hear_once
from tests.slow import slow
from tests.tiny_models import edit_json, tiny_checkpoint
from vlm_local.checkpoint import open_checkpoint
from vlm_local.engines.loading import load_model
from vlm_local.errors import ConfigError
from vlm_local.weights import count_packed_bytes, count_weights

_BLOCK = 16


def _store(family, bits, folder, kept=None, dtype=torch.float32):
    """A folder as transformers saves a model that it has quantised with bitsandbytes, all but the modules `kept`."""
    source = tiny_checkpoint(family)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == "4bit" else {"load_in_8bit": True}
    quantization = transformers.BitsAndBytesConfig(**options, llm_int8_skip_modules=kept)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        source, quantization_config=quantization, dtype=dtype
    )
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("qwen2-vl", "4bit"),
        slow("qwen2.5-vl", "4bit"),
        slow("qwen3-vl", "8bit"),
        slow("paligemma", "4bit"),
        ("paligemma2", "8bit"),
        slow("smolvlm2", "8bit"),
        slow("gemma4", "4bit"),
        slow("lfm2-vl", "4bit"),
        slow("gemma4-31b", "8bit"),
        slow("glm4v", "4bit"),
        slow("mistral3", "4bit"),
    ],
)
def test_a_folder_of_bitsandbytes_is_served_by_its_own_configuration(family, bits, tmp_path):
    folder = _store(family, bits, tmp_path / "stored")
    told, expected = hear(folder), hear_once(tiny_checkpoint(family), quantize=bits)
    assert told[0] == expected[0] and np.abs(told[1] - expected[1]).max() < 0.01
    assert told[2]["quantize"] == f"bitsandbytes-{bits}"
    assert told[2]["memory_bytes"] < hear_once(tiny_checkpoint(family))[2]["memory_bytes"]


@pytest.mark.parametrize(
    ("family", "bits", "kept", "listed"),
    [
        (
            *("qwen2-vl", "4bit", ["lm_head", "model.visual.merger", "model.language_model.layers.1.mlp"]),
            ["lm_head", "multi_modal_projector", "merger", "model.layers.1.mlp"],
        ),
        slow(
            *("gemma3", "8bit", ["lm_head", "model.vision_tower", "model.language_model.layers.0.mlp"]),
            ["lm_head", "vision_tower", "language_model.model.layers.0.mlp"],
        ),
        slow("smolvlm2", "4bit", ["lm_head", "model.connector"], ["lm_head", "modality_projection"]),
    ],
)
def test_layers_that_a_folder_of_bitsandbytes_holds_as_floats_stay_so(family, bits, kept, listed, tmp_path):
    """Whatever its configuration calls them: published copies list old names, and parts of names."""
    folder = _store(family, bits, tmp_path / "stored", kept)
    expected = hear(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = listed
    (folder / "config.json").write_text(json.dumps(config))
    told = hear(folder)
    assert told[0] == expected[0] and (told[1] == expected[1]).all()
    assert told[2]["memory_bytes"] > hear_once(tiny_checkpoint(family), quantize=bits)[2]["memory_bytes"]


def test_every_float_of_a_quantised_folder_gets_the_dtype_asked_for(tmp_path):
    """Gemma 3 has weights that are called neither weight nor bias."""
    folder = _store("gemma3", "8bit", tmp_path / "stored", dtype=torch.bfloat16)
    told, expected = hear(folder, dtype="float32"), hear(folder, dtype="bfloat16")
    assert np.abs(told[1] - expected[1]).max() < 0.05


def test_what_is_quantised_is_not_quantised_again_and_is_counted_as_it_lies(tmp_path):
    folder = _store("qwen2-vl", "4bit", tmp_path / "stored")
    with pytest.raises(ConfigError, match=r"already \(bitsandbytes-4bit\).*leave --quantize out"):
        hear(folder, quantize="8bit")
    size = (folder / "model.safetensors").stat().st_size
    floats = sum(count_weights(folder))
    assert size - 50_000 < count_packed_bytes(folder) + 4 * floats < size
    assert floats < sum(count_weights(tiny_checkpoint("qwen2-vl")))


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_mixture_whose_experts_would_stay_as_they_are_is_not_quantised(bits):
    with pytest.raises(ConfigError, match=f"mixture of experts, and --quantize {bits} would leave these"):
        hear(tiny_checkpoint("qwen3-vl-moe"), quantize=bits)


def _store_fp8(family, folder):
    """(float8 weights with a scale for each block, the same numbers as floats)."""
    source = tiny_checkpoint(family)
    stored, plain = shutil.copytree(source, folder / "fp8"), shutil.copytree(source, folder / "plain")
    packed, floats, generator = {}, {}, torch.Generator().manual_seed(0)
    for name, weight in safetensors.torch.load_file(source / "model.safetensors").items():
        packed[name] = floats[name] = weight
        if name.endswith("proj.weight") and "visual" not in name:
            blocks = weight.reshape(weight.shape[0] // _BLOCK, _BLOCK, weight.shape[1] // _BLOCK, _BLOCK)
            blocks = blocks * torch.rand(blocks.shape[0], 1, blocks.shape[2], 1, generator=generator)
            scale = blocks.abs().amax((1, 3)) / 448
            small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            packed[name], packed[f"{name}_scale_inv"] = small.reshape(weight.shape), scale
            floats[name] = (small.float() * scale[:, None, :, None]).reshape(weight.shape)
    safetensors.torch.save_file(packed, stored / "model.safetensors", {"format": "pt"})
    safetensors.torch.save_file(floats, plain / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [_BLOCK, _BLOCK]}
    edit_json(
        stored / "config.json", quantization_config=quantization | {"modules_to_not_convert": ["visual", "lm_head"]}
    )
    return stored, plain


@pytest.mark.parametrize("family", ["qwen2-vl", slow("qwen3.5-moe")])
def test_float8_weights_are_multiplied_by_their_scales(family, tmp_path):
    stored, plain = _store_fp8(family, tmp_path)
    assert differ(stored, plain) < 0.01 < differ(tiny_checkpoint(family), plain)
    assert open_checkpoint(stored).quant_method == "fp8"
    config = json.loads((stored / "config.json").read_text())
    del config["quantization_config"]
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is stored as F8_E4M3.*no quantization_config"):
        open_checkpoint(stored)


@pytest.mark.parametrize("family", ["mistral3", slow("mistral3-small")])
def test_float8_weights_with_one_scale_each_and_scales_for_activations_are_loaded(family, tmp_path):
    """As Ministral 3 is published. Mistral Small's head is one of its own, which its configuration does not say."""
    source = tiny_checkpoint(family)
    stored, plain = (shutil.copytree(source, tmp_path / name) for name in ("fp8", "plain"))
    packed, floats = {}, {}
    for name, weight in safetensors.torch.load_file(source / "model.safetensors").items():
        packed[name] = floats[name] = weight.bfloat16()
        if name.endswith("proj.weight") and name.startswith("language_model"):
            packed[f"{name}_scale_inv"] = scale = (weight.abs().max() / 440).bfloat16()
            packed[name.replace("weight", "activation_scale")] = torch.tensor(0.02).bfloat16()
            packed[name] = (weight / scale).to(torch.float8_e4m3fn)
            floats[name] = packed[name].float() * scale
    safetensors.torch.save_file(packed, stored / "model.safetensors", {"format": "pt"})
    safetensors.torch.save_file(floats, plain / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    quantization["modules_to_not_convert"] = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    edit_json(stored / "config.json", quantization_config=quantization, tie_word_embeddings=True)
    assert differ(stored, plain) < 0.001 < differ(source, plain)
    loaded = load_model(open_checkpoint(stored), dtype="float32")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}


def test_a_tensor_without_a_place_is_refused_by_name(folder):
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file(weights | {"model.language_model.extra.weight": torch.ones(2)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensors that have no place.*extra\.weight"):
        hear(folder)


def _add_packed(folder):
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.language_model.layers.0.mlp.up_proj.qweight"] = torch.ones(2, 2, dtype=torch.int32)
    safetensors.torch.save_file(weights, file, {"format": "pt"})


def test_packed_integers_without_a_word_in_the_config_are_refused(folder):
    _add_packed(folder)
    with pytest.raises(ConfigError, match=r"qweight is stored as I32.*unquantised"):
        open_checkpoint(folder)


@pytest.mark.parametrize("stored", [{"quant_method": "hqq"}, {"bits": 4}, {"quant_method": ["fp8"]}, "int4"])
def test_a_quantisation_that_is_not_understood_is_refused_by_its_name(folder, stored):
    edit_json(folder / "config.json", quantization_config=stored)
    with pytest.raises(ConfigError, match=r"quant_method .*; understood are bitsandbytes-4bit"):
        open_checkpoint(folder)


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8"])
def test_a_quantisation_that_cannot_be_loaded_here_is_refused_by_its_name(folder, method):
    """Without its package, or, as here, with weights that are not what the config says."""
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4, "weight_block_size": [1]})
    _add_packed(folder)
    with pytest.raises(ConfigError, match=f"(?s)quantised by {method}.*take the model's unquantised folder"):
        hear(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "awq"])
def test_a_quantisation_of_weights_that_are_plain_floats_is_refused(method, folder):
    """As a merge of an adapter into a quantised base may leave it behind."""
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    with pytest.raises(ConfigError, match=r"quantised \(.*\), but all are plain floats.*take quantization_config"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name: f"_orig_mod.{name}", r"lacks \d+ of the model's weights, as .*, and holds .* as _orig_mod\."),
        (lambda name: name.replace("layers.1", "layers.7"), r"lacks 12 of .* as model\.language_model\.layers\.1\."),
    ],
)
def test_weights_of_other_names_are_refused_with_both(change, said, folder):
    file = folder / "model.safetensors"
    weights = {change(name): weight for name, weight in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=said):
        hear(folder)


def test_a_weight_of_another_shape_is_refused_by_its_name(folder):
    """As DeepSpeed leaves empty ones behind."""
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(name for name in weights if name.endswith("layers.0.mlp.up_proj.weight"))
    safetensors.torch.save_file(weights | {name: torch.empty(0)}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"up_proj\.weight \(0,\) where config\.json makes it \(128, 64\)"):
        hear(folder)


@pytest.mark.parametrize("entry", [{}, {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}, [1]])
def test_a_header_that_describes_no_tensors_is_refused(folder, entry):
    header = json.dumps({"weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ConfigError, match="does not describe tensors"):
        open_checkpoint(folder)


def test_the_files_checked_are_the_files_loaded(folder):
    """transformers reads a single file where an index stands beside it."""
    _edit_index(folder, {"weight": "model-00001-of-00001.safetensors"})
    assert differ(folder, tiny_checkpoint("qwen2-vl")) == 0
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(ConfigError, match=r"lacks model-00001-of-00001\.safetensors"):
        open_checkpoint(folder)
    _edit_index(folder, {"weight": "other.safetensors"})
    assert differ(folder, tiny_checkpoint("qwen2-vl")) == 0
    for names in ({"weight": "../other.safetensors"}, {"weight": 3}, "other.safetensors"):
        _edit_index(folder, names)
        with pytest.raises(ConfigError, match=r"index\.json: expected weight_map"):
            open_checkpoint(folder)


def _edit_index(folder, names):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
