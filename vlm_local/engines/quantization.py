"""Quantised weights: --quantize, and folders that are quantised already."""

import logging

import torch
import transformers

from vlm_local.checkpoint import Checkpoint
from vlm_local.errors import ConfigError


def describe_quantization(checkpoint: Checkpoint, quantize: str, dtype: torch.dtype):
    """What transformers is to be told, None where the folder speaks for itself.

    dtype: in which --quantize 4bit computes. Raises ConfigError where weights would be quantised twice.
    """
    stored = checkpoint.quant_method
    if stored and quantize != "none":
        raise ConfigError(
            f"{checkpoint.folder} is quantised already ({stored}), so --quantize {quantize} cannot be had on top of "
            f"it; leave --quantize out, or take the model's unquantised folder"
        )
    if stored == "bitsandbytes-8bit" or quantize == "8bit":
        # It says for every layer of every forward that it casts to float16, which is what 8bit is.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if stored == "fp8":
        return _unpack_fp8(checkpoint)
    if quantize == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    if quantize == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return None


def _unpack_fp8(checkpoint: Checkpoint):
    """Have float8 weights multiplied by their scales while loading.

    transformers itself does so only without a GPU; with one it wants kernels from the hub.
    """
    config = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    stored = getattr(config, "quantization_config", None) or config.get_text_config().quantization_config
    try:
        return transformers.FineGrainedFP8Config(**stored | {"dequantize": True})
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{checkpoint.folder}, quantised by fp8, cannot be loaded: {error}") from error


def unify_floats(model, dtype: torch.dtype) -> None:
    """Give the weights that are not quantised one dtype: of a quantised folder transformers leaves each as stored."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and name.endswith((".weight", ".bias")):
            weight.data = weight.data.to(dtype)


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
