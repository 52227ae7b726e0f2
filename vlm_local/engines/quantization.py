"""Quantised weights: --quantize, and folders that are quantised already."""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping

from vlm_local.checkpoint import Checkpoint
from vlm_local.decoding.experts import has_experts
from vlm_local.engines.adapters import find_place
from vlm_local.errors import ConfigError
from vlm_local.weights import is_packed, list_weights, read_header

INSTEAD = "or take the model's unquantised folder, with --quantize where it is too large"


def describe_quantization(checkpoint: Checkpoint, config: Any, quantize: str, dtype: torch.dtype):
    """What transformers is to be told, None where the folder speaks for itself.

    dtype: in which --quantize 4bit computes. Raises ConfigError where weights would be quantised twice, and where next
        to none would be.
    """
    stored = checkpoint.quant_method
    if stored and quantize != "none":
        raise ConfigError(
            f"{checkpoint.folder} is quantised already ({stored}), so --quantize {quantize} cannot be had on top of "
            f"it; leave --quantize out, or take the model's unquantised folder"
        )
    if quantize != "none" and has_experts(config):
        raise ConfigError(
            f"{checkpoint.folder} is a mixture of experts, and --quantize {quantize} would leave these as they are: "
            f"bitsandbytes packs linear layers alone. Leave --quantize out, or take a dense model"
        )
    if stored == "bitsandbytes-8bit" or quantize == "8bit":
        # It says for every layer of every forward that it casts to float16, which is what 8bit is.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if stored == "fp8":
        return _unpack_fp8(checkpoint, config)
    if quantize == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if quantize == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return None


def _unpack_fp8(checkpoint: Checkpoint, config: Any):
    """Have float8 weights multiplied by their scales while loading.

    transformers itself does so only without a GPU; with one it wants kernels from the hub.
    """
    try:
        return transformers.FineGrainedFP8Config(**_find_stored(config) | {"dequantize": True})
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{checkpoint.folder}, quantised by fp8, cannot be loaded: {error}; {INSTEAD}") from error


def _find_stored(config: Any) -> Any:
    return getattr(config, "quantization_config", None) or config.get_text_config().quantization_config


def build_plain(config: Any) -> Any:
    """The model as it is without its quantisation: names and shapes, no weights."""
    with torch.device("meta"):
        return transformers.AutoModelForImageTextToText.from_config(copy.deepcopy(config))


def keep_stored_floats(config: Any, plain: Any, folder: Path) -> None:
    """Have bitsandbytes pack exactly the layers that the folder holds packed.

    The folder lists the others in llm_int8_skip_modules, but as an older transformers read it: by its own names of the
    modules, or by any part of a name ("merger"). Read as names of today, layers of plain floats are taken for packed.
    """
    renamings = get_model_conversion_mapping(plain)
    weights = dict(plain.named_parameters(remove_duplicate=False))
    packed: set[str] = set()
    for key, tensor in ((key, tensor) for file in list_weights(folder) for key, tensor in read_header(file).items()):
        name = find_place(key, renamings, weights)
        if name is not None and (is_packed(tensor) or tuple(tensor["shape"]) != weights[name].shape):
            packed.add(name)
    linear = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    _find_stored(config)["llm_int8_skip_modules"] = [name for name in linear if f"{name}.weight" not in packed]


def unify_floats(model: Any, plain: Any, dtype: torch.dtype) -> None:
    """Give the weights that are not quantised one dtype: of a quantised folder transformers leaves each as stored.

    What a quantiser adds, scales for example, stays; so do packed weights, which may be stored as if they were floats.
    """
    shapes = {name: weight.shape for name, weight in plain.named_parameters(remove_duplicate=False)}
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.shape == shapes.get(name):
            weight.data = weight.data.to(dtype)


def settle_8bit(model) -> None:
    """Flatten what has four dimensions, which 8-bit layers do not take: a picture's rows and columns in LFM2-VL's
    projector, behind which its tokens stand in a line anyhow.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(lambda _, given: given[0].flatten(1, 2) if given[0].dim() == 4 else None)


def settle_4bit(model, dtype: torch.dtype) -> None:
    """Let 4-bit layers compute in `dtype`, whatever the folder names: float16 overflows in Qwen and Gemma.

    Odd layers skip bitsandbytes' packed CPU kernel, which takes multiples of 64 inputs and 32 outputs. It is
    chosen by the processor alone, and the vision towers of PaliGemma and Qwen2.5-VL have others.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
            if module.in_features % 64 or module.out_features % 32:
                module.support_avx512bf16_for_cpu = False
