"""Folders spelt as the published ones: flat or short configurations, old names, shards, tensors for drafting."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch

from tests.hearing import differ
from tests.slow import slow
from tests.tiny_models import tiny_checkpoint


def _flatten(config):
    """Qwen2-VL's and Qwen2.5-VL's: the language model's part stands in the open, vision_config has names of its own."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    vision = config["vision_config"]
    vision |= {"in_chans": vision.pop("in_channels"), "spatial_patch_size": vision["patch_size"]}
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "sliding_window": 32768, "max_window_layers": 28}
    return {**text, **config, **old, "use_sliding_window": False, "torch_dtype": config.pop("dtype")}


def _split_rope(config):
    """Qwen3-VL's."""
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    return config


def _spell_glm(config):
    """How much of a head has positions is told beside, and the vision tower has the name of the whole."""
    text, vision = config["text_config"], config["vision_config"]
    rope = text.pop("rope_parameters")
    text |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    text |= {"rope_scaling": rope, "attention_bias": True}
    vision |= {"model_type": "glm4v"}
    vision.pop("rope_parameters")
    return config


def _rename_glm(config):
    """transformers' second name for the same model."""
    return config | {"model_type": "glm46v", "architectures": ["Glm46VForConditionalGeneration"]}


def _shorten_gemma3(config):
    """What equals the defaults of its day is not there; rotary embeddings and layers are told otherwise."""
    text = config["text_config"]
    for key in ("rope_parameters", "layer_types", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"):
        text.pop(key, None)
    text |= {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 2}
    return config


def _shorten_internvl(config):
    """Whether the head is tied, the language model's part alone says."""
    config.pop("tie_word_embeddings", None)
    rope = config["text_config"].pop("rope_parameters")
    scaling = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    config["text_config"] |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "sliding_window": None}
    return config


def _spell_gemma4(config):
    """Heads of the layers without a window have a name of their own, the vision tower's rotary embedding an old one."""
    text, vision = config["text_config"], config["vision_config"]
    text |= {"global_head_dim": text.pop("per_layer_config")["1"]["head_dim"], "num_global_key_value_heads": None}
    vision |= {"rope_parameters": {"rope_theta": 100.0, "rope_type": "default"}, "default_output_length": 70}
    return config | {"vision_soft_tokens_per_image": 70, "eoa_token_id": config["eoa_token_index"]}


def _spell_lfm2(config):
    """The language model's part as LFM2 was written before it was in transformers."""
    text = config["text_config"]
    for key in ("rope_parameters", "pad_token_id", "bos_token_id", "tie_word_embeddings"):
        text.pop(key)
    text |= {"block_ff_dim": text["intermediate_size"], "block_dim": 64, "rope_theta": 1e6, "conv_dim": 64}
    return config | {"max_image_tokens": 256, "tile_size": 512, "use_thumbnail": False, "vision_feature_layer": -1}


def _spell_molmo2(config):
    """The vision tower has another name, and layers more than there are weights: those behind the last that is read."""
    text, vision, pool = config["text_config"], config.pop("vision_config"), config["adapter_config"]
    rope = text.pop("rope_parameters")
    is_scaled = rope["rope_type"] != "default"
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope if is_scaled else None}
    text |= {"layer_norm_eps": text.pop("rms_norm_eps"), "qkv_bias": text.pop("attention_bias"), "use_qk_norm": True}
    text |= {} if is_scaled else {"rope_scaling_layers": None}
    vision |= {"image_default_input_size": vision.pop("image_size"), "image_patch_size": vision.pop("patch_size")}
    vision |= {"image_num_pos": vision.pop("num_position_embeddings"), "num_hidden_layers": 5, "model_type": "molmo2"}
    pool |= {"vit_layers": [layer - 5 for layer in pool.pop("vision_feature_layer")], "pooling_attention_mask": True}
    return config | {"vit_config": vision, "auto_map": {"AutoConfig": "configuration_molmo2.Molmo2Config"}}


# Of layers that read the KV of earlier ones, and have these weights all the same.
_SHARED = tuple(
    f"model.language_model.layers.{layer}.self_attn.{name}.weight" for layer in (2, 3) for name in ("k_proj", "k_norm")
)


def _name_ropes(config):
    """Ministral 3's: an old name of the vision tower's rotary embedding; the text's part says that the head is tied."""
    config.pop("tie_word_embeddings")
    config["text_config"] |= {"tie_word_embeddings": True}
    config["text_config"]["rope_parameters"] |= {"type": "yarn"}
    config["vision_config"]["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "default"}
    return config


def _shorten_mistral(config):
    """Mistral Small 3.1's: nothing says that the head is one of its own."""
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings")
    for part in (config["text_config"], config["vision_config"]):
        part["rope_theta"] = part.pop("rope_parameters")["rope_theta"]
    return config


def _keep(config_or_weights):
    return config_or_weights


def _nest_siglip(weights):
    pattern = r"^(model\.)?vision_tower\."  # the first part in LFM2-VL's
    return {re.sub(pattern, r"\1vision_tower.vision_model.", name): each for name, each in weights.items()}


def _repeat_head(weights):
    """Cosmos-Reason2-2B's."""
    return weights | {"lm_head.weight": weights["model.language_model.embed_tokens.weight"].clone()}


def _repeat_nested_head(weights):
    """Ministral 3's 3B."""
    return weights | {"language_model.lm_head.weight": weights["language_model.model.embed_tokens.weight"].clone()}


def _transpose_experts(weights):
    """Qwen3-VL's."""
    return {name: each.mT.contiguous() if ".experts." in name else each for name, each in weights.items()}


def _join_experts(weights):
    """Qwen3.5's, of which only the float8 copies hold each expert by itself."""
    joined = {name: each for name, each in weights.items() if ".experts." not in name}
    for place in {name.split(".experts.")[0] for name in weights.keys() - joined.keys()}:
        several = [
            [weights[f"{place}.experts.{expert}.{part}_proj.weight"] for expert in range(8)]
            for part in ("gate", "up", "down")
        ]
        gate, up, down = map(torch.stack, several)
        joined |= {f"{place}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{place}.experts.down_proj": down}
    return joined


def _part_tables(weights):
    """Molmo2's, whose extra tokens are a table of their own; transformers writes two of the same length."""
    parts = ["model.transformer.wte.embedding", "model.transformer.wte.new_embedding"]
    table, rows = torch.cat([weights[name] for name in parts]), len(weights["lm_head.weight"])
    return weights | dict(zip(parts, (table[:rows].clone(), table[rows:].clone()), strict=True))


@pytest.mark.parametrize(
    ("family", "spell", "store", "added"),
    [
        ("qwen2-vl", _flatten, _keep, ()),
        slow("qwen2.5-vl", _flatten, _keep, ()),
        slow("qwen3-vl", _split_rope, _keep, ()),
        slow("qwen3-vl", _split_rope, _repeat_head, ()),
        ("qwen3-vl-moe", _split_rope, _transpose_experts, ()),
        ("qwen3.5", _keep, _keep, ("mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight")),
        slow("qwen3.5-moe", _keep, _join_experts, ("mtp.layers.0.mlp.experts.down_proj",)),
        slow("paligemma", _keep, _nest_siglip, ()),
        ("gemma3", _shorten_gemma3, _nest_siglip, ()),
        ("gemma4", _spell_gemma4, _keep, _SHARED),
        ("glm4v", _spell_glm, _keep, ()),
        slow("glm4v", _rename_glm, _keep, ()),
        slow("lfm2-vl", _spell_lfm2, _nest_siglip, ()),
        slow("internvl", _shorten_internvl, _keep, ()),
        ("molmo2", _spell_molmo2, _part_tables, ()),
        slow("molmo2-o", _spell_molmo2, _part_tables, ()),
        ("mistral3", _name_ropes, _repeat_nested_head, ()),
        slow("mistral3-small", _shorten_mistral, _keep, ()),
    ],
)
def test_a_folder_spelt_as_the_published_one_is_the_same_model(family, spell, store, added, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(family), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(spell(config)))
    weights = store(safetensors.torch.load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    weights |= {name: torch.ones(4, 4) for name in added}
    places = {
        name: f"model.safetensors-0000{row % 2 + 1}-of-00002.safetensors" for row, name in enumerate(sorted(weights))
    }
    for file in set(places.values()):
        part = {name: each for name, each in weights.items() if places[name] == file}
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert differ(folder, tiny_checkpoint(family)) < 1e-9  # how an expert rounds depends on where its weights lie
