"""The families' own classes, small and random."""

import functools

import torch
import transformers

_WIDTH = 64
_INIT = 0.15  # wide enough that phrases differ in probability, narrow enough that none has it all

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": _WIDTH}


def _describe_text(vocab_size: int, ids: dict[str, int]) -> dict:
    return {
        "vocab_size": vocab_size,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": _INIT,
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
    }


def _describe_qwen(vocab_size: int, ids: dict[str, int], interleaved: bool = False) -> dict:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    rope |= {"mrope_interleaved": True} if interleaved else {}
    return {
        "text_config": _describe_text(vocab_size, ids) | {"rope_parameters": rope, "bos_token_id": None},
        "image_token_id": ids["image"],
        "video_token_id": ids["video"],
        "vision_start_token_id": ids["start"],
        "vision_end_token_id": ids["end"],
        "tie_word_embeddings": True,
    }


def _build_qwen2(vocab_size: int, ids: dict[str, int]):
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": _WIDTH, "mlp_ratio": 2}
    vision |= {"initializer_range": _INIT}
    config = transformers.Qwen2VLConfig(vision_config=vision, **_describe_qwen(vocab_size, ids))
    return transformers.Qwen2VLForConditionalGeneration(config)


def _build_qwen25(vocab_size: int, ids: dict[str, int]):
    vision = _QWEN_VISION | {"fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(vision_config=vision, **_describe_qwen(vocab_size, ids))
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _describe_experts(**more: int) -> dict:
    """No square matrix among them: Qwen3-VL's are stored transposed, and found out by their shape."""
    return {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, **more}


def _build_qwen3(vocab_size: int, ids: dict[str, int], kind: str = "Qwen3VL"):
    vision = _QWEN_VISION | {"num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    options = _describe_qwen(vocab_size, ids, interleaved=True)
    options["text_config"] |= {"head_dim": 16} | (_describe_experts() if kind.endswith("Moe") else {})
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, **options)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _build_qwen35(vocab_size: int, ids: dict[str, int], kind: str = "Qwen3_5"):
    vision = _QWEN_VISION | {"num_position_embeddings": 256, "initializer_range": _INIT}
    options = _describe_qwen(vocab_size, ids, interleaved=True)
    text = options["text_config"]
    text["rope_parameters"] |= {"partial_rotary_factor": 1.0}
    text |= {"head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
    text |= {"num_hidden_layers": 3, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= _describe_experts(shared_expert_intermediate_size=_WIDTH) if kind.endswith("Moe") else {}
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, **options)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    for layer in model.model.language_model.layers[::2]:  # at random most heads forget all within some tokens
        layer.linear_attn.A_log.data = torch.tensor([0.001, 0.01, 0.1, 1.0]).log()
    return model


def _build_paligemma(vocab_size: int, ids: dict[str, int], text_type: str = "gemma"):
    text = _describe_text(vocab_size, ids) | {"model_type": text_type, "head_dim": 16, "bos_token_id": ids["bos"]}
    if text_type == "gemma2":  # a window shorter than the prompt, so that it matters
        text |= {"sliding_window": 16, "query_pre_attn_scalar": 16}
    vision = _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
    vision |= {"image_size": 56, "patch_size": 14}
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=ids["image"],
        projection_dim=_WIDTH,
        hidden_size=_WIDTH,
        vocab_size=vocab_size,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def _build_gemma3(vocab_size: int, ids: dict[str, int]):
    text = _describe_text(vocab_size, ids) | {"head_dim": 16, "bos_token_id": ids["bos"], "query_pre_attn_scalar": 16}
    # A window longer than a picture and shorter than the prompt, as in the real ones.
    text |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    vision = _VISION | {"image_size": 112, "patch_size": 14, "vision_use_head": False}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=16,
        image_token_index=ids["image"],
        boi_token_index=ids["begin"],
        eoi_token_index=ids["end"],
        eos_token_id=[ids["document_end"], ids["eos"]],
        initializer_range=_INIT,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=_INIT)  # else it is blind
    return model


def _build_gemma4(vocab_size: int, ids: dict[str, int], large: dict | None = None):
    """large: what the text part of a larger model has otherwise, None for the small ones."""
    kinds = ["sliding_attention", "full_attention"] * 2
    text = _describe_text(vocab_size, ids) | {"head_dim": 16, "global_head_dim": 32, "bos_token_id": ids["bos"]}
    text |= {"num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 24, "final_logit_softcapping": 30.0}
    if large is None:
        text |= {"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8}
        text |= {"vocab_size_per_layer_input": vocab_size}
    else:
        text |= {"hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"} | large
    vision = _VISION | {"num_key_value_heads": 2, "head_dim": 16, "patch_size": 4, "position_embedding_size": 256}
    vision |= {"use_clipped_linears": large is None, "standardize": large is not None, "initializer_range": _INIT}
    sound = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 16}
    config = transformers.Gemma4Config(
        text_config=text,
        vision_config=vision,
        audio_config=sound | {"subsampling_conv_channels": [8, 4]} if large is None else None,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        initializer_range=_INIT,
    )
    model = transformers.Gemma4ForConditionalGeneration(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("layer_scalar", "per_expert_scale", "std_scale", "norm.weight")):
            tensor.data.uniform_(0.7, 1.3)
        elif name.endswith(("position_embedding_table", "std_bias")):
            tensor.data.normal_(std=_INIT)
        elif name.endswith(("put_min", "put_max")):  # a quarter of the numbers is beyond
            tensor.data.fill_(-1.0 if name.endswith("min") else 1.0)
    return model


def _build_glm(vocab_size: int, ids: dict[str, int]):
    """Half of each head has positions, and the vision tower's table of them is smaller than a picture."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
    vision = _QWEN_VISION | {"image_size": 56, "intermediate_size": 96, "initializer_range": _INIT}
    config = transformers.Glm4vConfig(
        text_config=_describe_text(vocab_size, ids) | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        image_start_token_id=ids["start"],
        image_end_token_id=ids["end"],
    )
    return transformers.Glm4vForConditionalGeneration(config)


def _build_lfm2(vocab_size: int, ids: dict[str, int]):
    text = _describe_text(vocab_size, ids) | {"model_type": "lfm2", "bos_token_id": ids["bos"]}
    text |= {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    vision = _VISION | {"model_type": "siglip2_vision_model", "patch_size": 8, "num_patches": 25}
    config = transformers.Lfm2VlConfig(
        vision_config=vision | {"vision_use_head": False},
        text_config=text | {"block_multiple_of": 16},
        image_token_id=ids["image"],
        projector_hidden_size=_WIDTH,
        initializer_range=_INIT,
    )
    model = transformers.Lfm2VlForConditionalGeneration(config)
    for name, tensor in model.named_parameters():
        if name.endswith(("conv.conv.weight", "language_model.layers.1.self_attn.out_proj.weight")):
            tensor.data.normal_(std=0.5)  # else what came before hardly counts
    return model


def _build_internvl(vocab_size: int, ids: dict[str, int], text_type: str = "qwen2"):
    vision = _VISION | {"image_size": 64, "patch_size": 8, "initializer_range": _INIT}
    text = _describe_text(vocab_size, ids) | {"model_type": text_type, "bos_token_id": None}
    text |= {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}
    text |= _describe_experts(head_dim=16) if text_type.endswith("moe") else {}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=ids["image"], image_seq_length=16
    )
    return transformers.InternVLForConditionalGeneration(config)


def _build_molmo2(vocab_size: int, ids: dict[str, int], is_olmo: bool = False):
    """An odd number of patches a side, as in the real ones: some tokens pool one or two. Extra rows are the last."""
    rows = ids["image"]
    text = _describe_text(rows, ids) | {"head_dim": 16, "additional_vocab_size": vocab_size - rows}
    text |= {"max_position_embeddings": 1 << 15, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}}
    if is_olmo:
        rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "attention_factor": 1.2}
        text |= {"rope_parameters": rope | {"rope_theta": 10_000.0, "beta_fast": 32.0, "beta_slow": 1.0}}
        text |= {"qk_norm_type": "olmo", "norm_after": True, "rope_scaling_layers": [1], "num_key_value_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"num_key_value_heads": 2, "head_dim": 16, "image_size": [70, 70], "patch_size": 14}
    pool = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    pool |= {"intermediate_size": 64, "text_hidden_size": _WIDTH, "vision_feature_layer": [2, 0]}
    config = transformers.Molmo2Config(
        text_config=text,
        vision_config=vision | {"initializer_range": _INIT},
        adapter_config=pool | {"initializer_range": _INIT},
        image_patch_id=ids["image"],
        initializer_range=_INIT,
    )
    return transformers.Molmo2ForConditionalGeneration(config)


def _build_mistral(vocab_size: int, ids: dict[str, int], is_small: bool = False):
    """is_small: Mistral Small, else Ministral 3, whose queries grow with their position, here within a prompt."""
    text = _describe_text(vocab_size, ids) | {"head_dim": 16, "bos_token_id": ids["bos"], "sliding_window": None}
    if is_small:
        text |= {"model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}
    else:
        rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 32}
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}
        text |= {"model_type": "ministral3", "rope_parameters": rope, "max_position_embeddings": 512}
    vision = _VISION | {"patch_size": 14, "image_size": 1540, "hidden_act": "silu", "initializer_range": _INIT}
    config = transformers.Mistral3Config(
        vision_config=vision, text_config=text, image_token_index=ids["image"], tie_word_embeddings=not is_small
    )
    model = transformers.Mistral3ForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight") or name.endswith("ln_pre.weight"):
            weight.data.uniform_(0.7, 1.3)
    return model


def _build_smolvlm(vocab_size: int, ids: dict[str, int], kind: str = "SmolVLM"):
    vision = _VISION | {"image_size": 64, "patch_size": 8}
    text = _describe_text(vocab_size, ids) | {"model_type": "llama", "bos_token_id": ids["bos"]}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, scale_factor=2, image_token_id=ids["image"], tie_word_embeddings=True
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


_DENSE = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32} | _DENSE
BUILDERS = {
    "qwen2-vl": _build_qwen2,
    "qwen2.5-vl": _build_qwen25,
    "qwen3-vl": _build_qwen3,
    "qwen3.5": _build_qwen35,
    "qwen3-vl-moe": functools.partial(_build_qwen3, kind="Qwen3VLMoe"),
    "qwen3.5-moe": functools.partial(_build_qwen35, kind="Qwen3_5Moe"),
    "paligemma": _build_paligemma,
    "paligemma2": functools.partial(_build_paligemma, text_type="gemma2"),
    "gemma3": _build_gemma3,
    "gemma4": _build_gemma4,
    "gemma4-31b": functools.partial(_build_gemma4, large=_DENSE),
    "gemma4-26b": functools.partial(_build_gemma4, large=_EXPERTS),
    "glm4v": _build_glm,
    "lfm2-vl": _build_lfm2,
    "internvl": _build_internvl,
    "internvl-moe": functools.partial(_build_internvl, text_type="qwen3_moe"),
    "molmo2": _build_molmo2,
    "molmo2-o": functools.partial(_build_molmo2, is_olmo=True),
    "mistral3": _build_mistral,
    "mistral3-small": functools.partial(_build_mistral, is_small=True),
    "smolvlm": functools.partial(_build_smolvlm, kind="Idefics3"),
    "smolvlm2": _build_smolvlm,
}
