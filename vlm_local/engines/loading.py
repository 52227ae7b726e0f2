"""From a checkpoint's folder to a model in memory: device, dtype, quantisation, adapter, end token."""

import logging

import torch
import transformers

from vlm_local.checkpoint import Checkpoint, count_weights, estimate_memory
from vlm_local.decoding.types import LoadedModel
from vlm_local.engines.processing import find_lead, load_processor
from vlm_local.errors import ConfigError
from vlm_local.machine import SPARE, has_fast_bfloat16, measure_free_memory

QUANTIZE = ("none", "8bit", "4bit")

_SMALL = 1 << 30  # bytes of float32 weights up to which the CPU keeps them


def load_model(
    checkpoint: Checkpoint, quantize: str = "none", device: str = "auto", dtype: str = "auto"
) -> LoadedModel:
    """Read a checkpoint's weights onto a device; says it before when they will not fit."""
    place = _choose_device(device)
    set_up_device(place)
    weights = count_weights(checkpoint.folder)
    chosen = _choose_dtype(dtype, place, weights, quantize)
    _check_memory(checkpoint, weights, quantize, chosen, place)
    processor = load_processor(checkpoint.folder, checkpoint.family)
    try:
        model, info = transformers.AutoModelForImageTextToText.from_pretrained(
            checkpoint.folder,
            dtype=chosen,
            device_map={"": place},
            quantization_config=_describe_quantization(quantize, chosen),
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{checkpoint.folder} cannot be loaded: {error}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(f"{checkpoint.folder} lacks {len(missing)} of the model's weights, {missing[0]} among them")
    if checkpoint.adapter:
        model = _merge_adapter(model, checkpoint)
    model.eval().requires_grad_(False)
    if quantize == "4bit":
        _avoid_packing(model)
    eos_token_id = _find_end_token(model, processor.tokenizer, checkpoint)
    lead = find_lead(processor, checkpoint.family)
    return LoadedModel(model, processor.tokenizer, processor, checkpoint.family, place, chosen, eos_token_id, lead)


def _choose_device(name: str) -> torch.device:
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: expected auto, cpu, or cuda:N") from None
    if device.type == "cuda" and not count:
        raise ConfigError(f"--device {name}: torch {torch.__version__} sees no GPU; `vlm-local doctor` says why")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"--device {name}: this machine has cuda:0 to cuda:{count - 1}")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu, or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def set_up_device(device: torch.device) -> None:
    """Leave cuDNN's attention alone on a GPU: it plans anew for every new length, and lengths change with
    each forward that is not captured (docs/benchmarks.md: 250 ms a step on an H100, where the GPU worked for 14).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _choose_dtype(name: str, device: torch.device, weights: tuple[int, int], quantize: str) -> torch.dtype:
    """auto: bfloat16 where it is fast and the model not small, or where float32 does not fit.

    Never float16 unasked: Qwen's and Gemma's activations leave its range.
    """
    if name != "auto":
        return getattr(torch, name)
    is_small = device.type == "cpu" and 4 * sum(weights) <= _SMALL
    if has_fast_bfloat16(str(device)) and not is_small:
        return torch.bfloat16
    fits = SPARE * estimate_memory(*weights, quantize, 4) <= measure_free_memory(str(device))
    return torch.float32 if fits else torch.bfloat16


def _check_memory(
    checkpoint: Checkpoint, weights: tuple[int, int], quantize: str, dtype: torch.dtype, device: torch.device
) -> None:
    needed = SPARE * estimate_memory(*weights, quantize, dtype.itemsize)
    free = measure_free_memory(str(device))
    if needed <= free:
        return
    smaller = [kind for kind in QUANTIZE if SPARE * estimate_memory(*weights, kind, 2) <= free]
    mend = f"--dtype bfloat16 --quantize {smaller[0]} would fit" if smaller else "take a smaller model"
    raise ConfigError(
        f"{checkpoint.name} needs about {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')} with "
        f"--quantize {quantize}, but {device} has {free / 1e9:.1f} GB free; {mend} (`vlm-local models` lists sizes)"
    )


def _describe_quantization(quantize: str, dtype: torch.dtype):
    if quantize == "none":
        return None
    if quantize == "8bit":
        # It says for every layer of every forward that it casts to float16, which is what 8bit is.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _avoid_packing(model) -> None:
    """Let odd layers skip bitsandbytes' packed CPU kernel, which takes multiples of 64 inputs and 32 outputs.

    It is chosen by the processor alone, and the vision towers of PaliGemma and Qwen2.5-VL have others.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and (module.in_features % 64 or module.out_features % 32):
            module.support_avx512bf16_for_cpu = False


def _merge_adapter(model, checkpoint: Checkpoint):
    """The base with a LoRA adapter's weights added into its own."""
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError(f"{checkpoint.adapter} is a LoRA adapter: pip install 'vlm-local[train]' for peft") from None
    try:
        return PeftModel.from_pretrained(model, checkpoint.adapter).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{checkpoint.adapter} does not fit its base {checkpoint.folder}: {error}") from error


def _find_end_token(model, tokenizer, checkpoint: Checkpoint) -> int:
    """The tokenizer's end token, which the masks allow; generation_config must end an answer on it, too."""
    told = model.generation_config.eos_token_id
    known = told if isinstance(told, list) else [told]
    if tokenizer.eos_token_id is None or tokenizer.eos_token_id not in known:
        raise ConfigError(
            f"{checkpoint.folder} contradicts itself: the tokenizer ends an answer with {tokenizer.eos_token!r} "
            f"({tokenizer.eos_token_id}), generation_config.json with {told}; make eos_token_id the same in both"
        )
    return tokenizer.eos_token_id
