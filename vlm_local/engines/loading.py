"""Loads a checkpoint's folder into memory: device, dtype, quantisation, adapter, end token."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from vlm_local.checkpoint import BITSANDBYTES, Checkpoint
from vlm_local.decoding.experts import IMPLEMENTATION, has_experts
from vlm_local.decoding.families import LoadedModel
from vlm_local.engines.adapters import add_adapter
from vlm_local.engines.processing import is_chat
from vlm_local.engines.processors import check_pictures, check_tokens, load_processor
from vlm_local.engines.quantization import (
    INSTEAD,
    build_plain,
    describe_quantization,
    keep_stored_floats,
    settle_4bit,
    settle_8bit,
    unify_floats,
)
from vlm_local.engines.templates import AnswerFrame, find_frame
from vlm_local.errors import ConfigError
from vlm_local.machine import SPARE, has_fast_bfloat16, measure_free_memory
from vlm_local.progress import is_shown
from vlm_local.weights import CONFIG, count_packed_bytes, count_weights, estimate_memory, is_unread

QUANTIZE = ("none", "8bit", "4bit")

_LONGEST = 1 << 14  # columns: no prompt with its pictures has as many
_ATTENTIONS = (None, "eager", "sdpa")
_SMALL = 1 << 30  # bytes of float32 weights up to which the CPU keeps them


@dataclass(frozen=True)
class _Size:
    """Numbers of float weights in linear layers and elsewhere, and bytes of those that the folder has packed."""

    linear: int
    rest: int
    packed: int

    def estimate(self, quantize: str, item_bytes: int) -> int:
        """Bytes in memory, with floats of `item_bytes`."""
        return self.packed + estimate_memory(self.linear, self.rest, quantize, item_bytes)


def load_model(
    checkpoint: Checkpoint, quantize: str = "none", device: str = "auto", dtype: str = "auto"
) -> LoadedModel:
    """Read a checkpoint's weights onto a device; says it before when they will not fit."""
    place = _choose_device(device)
    set_up_device(place)
    size = _Size(*count_weights(checkpoint.folder), count_packed_bytes(checkpoint.folder))
    chosen = _choose_dtype(dtype, place, size, quantize)
    config = _read_config(checkpoint)
    quantization = describe_quantization(checkpoint, config, quantize, chosen)
    kinds = QUANTIZE[:1] if checkpoint.quant_method or has_experts(config) else QUANTIZE
    _check_memory(checkpoint, size, quantize, kinds, chosen, place)
    processor = load_processor(checkpoint.folder, checkpoint.family, checkpoint.adapter)
    words = Path(processor.tokenizer.name_or_path)  # the adapter's folder, where it has a tokenizer
    check_tokens(processor, config, words)
    frame = find_frame(processor, words) if is_chat(checkpoint.family) else AnswerFrame()
    model = _read_weights(checkpoint, config, chosen, place, quantization)
    if checkpoint.adapter:
        add_adapter(model, checkpoint.adapter)
    model.eval().requires_grad_(False)
    if quantize == "4bit" or checkpoint.quant_method == "bitsandbytes-4bit":
        settle_4bit(model, chosen)
    if quantize == "8bit" or checkpoint.quant_method == "bitsandbytes-8bit":
        settle_8bit(model)
    multiply_patches(model)
    fix_rotary(model)
    tokenizer, family = processor.tokenizer, checkpoint.family
    check_pictures(processor, model.config, checkpoint.folder)
    tokenizer.eos_token_id = _find_end_token(model, tokenizer, frame, checkpoint)
    return LoadedModel(model, tokenizer, processor, family, place, chosen, tokenizer.eos_token_id, frame.lead)


def _read_config(checkpoint: Checkpoint) -> Any:
    """The model's configuration as transformers reads it, with an attention that takes our masks."""
    file = checkpoint.folder / CONFIG
    try:
        config: Any = transformers.AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
        text = config.get_text_config()
        rope = (text.rope_parameters or {}).get("rope_type")
        is_long = text.max_position_embeddings >= _LONGEST  # see fix_rotary
    except Exception as error:  # whatever a class makes of a stranger's values
        raise ConfigError(
            f"{file} cannot be read by transformers {transformers.__version__}: {type(error).__name__}: {error}"
        ) from error
    if rope == "longrope" or (rope == "dynamic" and not is_long):
        raise ConfigError(
            f"{file}: rope_type is {rope!r}, by which a token's place depends on how long the prompt is, but prompts "
            f'are read in parts here; write "default" where they stay below max_position_embeddings'
        )
    window, layer = getattr(text, "sliding_window", None), getattr(config, "vision_feature_layer", -1)
    if checkpoint.family == "mistral3" and (window or layer != -1):
        raise ConfigError(
            f"{file}: sliding_window is {window} and vision_feature_layer {layer}, but a model of this type is read "
            f"without a window and behind its vision tower's last layer (null and -1), as all published ones are"
        )
    if getattr(config, "audio_config", None) is not None:
        config.audio_config = None  # nobody shows a sound: a twentieth of Gemma 4's weights
    if config._attn_implementation not in _ATTENTIONS:
        config._attn_implementation = "sdpa"  # the same sum; flash attention takes no mask for a tree
    if has_experts(config):
        text._experts_implementation = IMPLEMENTATION  # the whole of an InternVL refuses it
    return config


def _read_weights(checkpoint: Checkpoint, config: Any, dtype: torch.dtype, device: torch.device, quantization):
    """The model with exactly the tensors of its folder. Raises ConfigError where one is missing or has no place."""
    folder, method = checkpoint.folder, checkpoint.quant_method
    kind = f"{folder}, quantised by {method}," if method else str(folder)
    options = {} if quantization is None else {"quantization_config": quantization}
    if not is_shown():
        transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers.modeling_utils").addFilter(_is_no_report)
    try:
        plain = build_plain(config) if method else None
        if plain is not None and method in BITSANDBYTES:
            keep_stored_floats(config, plain, folder)
        loaded: Any = transformers.AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by their names
            **options,
        )
        model, info = loaded  # a pair where output_loading_info is asked for
    except (OSError, ValueError, RuntimeError, ImportError, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"{kind} cannot be loaded: {error}{f'; {INSTEAD}' if method else ''}") from error
    if faults := _list_faults(info, checkpoint.family):
        raise ConfigError(f"{kind} {', and '.join(faults)}; what is served would not be this model")
    if plain is not None:
        unify_floats(model, plain, dtype)
    return model


def _list_faults(info: Mapping[str, Any], family: str) -> list[str]:
    """What is wrong with a folder's tensors by transformers' report of the load."""
    faults = []
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        faults.append(f"has {name} {tuple(stored)} where config.json makes it {tuple(expected)}")
    if missing := sorted(info["missing_keys"]):
        faults.append(f"lacks {len(missing)} of the model's weights, as {missing[-1]}")
    if unplaced := sorted(name for name in info["unexpected_keys"] if not is_unread(name)):
        faults.append(f"holds {len(unplaced)} tensors that have no place in a {family}, as {unplaced[-1]}")
    return faults


def _is_no_report(record: logging.LogRecord) -> bool:
    """Whether it is not transformers' table of tensors without a place: those that matter are refused by name, and
    Gemma 4's for sounds fill a screen. One with errors of conversion is what the error refers to.
    """
    text = record.getMessage()
    return "LOAD REPORT" not in text or "CONVERSION" in text


class _PatchProduct(torch.nn.Conv3d):
    """A convolution of patches (n, ...) each as large as its kernel: a matrix product, which torch.conv3d takes several
    times as long for (docs/decisions.md).
    """

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        product = torch.nn.functional.linear(input.flatten(1), weight.flatten(1), bias)
        return product[:, :, None, None, None]


def multiply_patches(model: torch.nn.Module) -> None:
    """Qwen's vision towers see each patch by a matrix product; their weights and names stay."""
    for module in model.modules():
        if type(module) is torch.nn.Conv3d:
            module.__class__ = _PatchProduct


def fix_rotary(model: torch.nn.Module) -> None:
    """InternVL's rotary embedding is "dynamic": each forward asks for the last position, which no graph can hold and a
    prompt that is read in parts does not know. Within the length that the model was trained for it is the default one.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic" and module.original_max_seq_len >= _LONGEST:
            module.rope_type = "default"


def _choose_device(name: str) -> torch.device:
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name}: expected auto, cpu, or cuda:N") from None
    if device.type == "cuda" and not count:
        raise ConfigError(f"--device {name}: torch {torch.__version__} sees no GPU; `doctor` says why")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(f"--device {name}: this machine has cuda:0 to cuda:{count - 1}")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: expected auto, cpu, or cuda:N")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def set_up_device(device: torch.device) -> None:
    """Switch off cuDNN's attention on a GPU: it makes a plan for every new length, and forwards that are not
    captured have a new length each time (docs/gpu-checklist.md says what was seen).
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def _choose_dtype(name: str, device: torch.device, size: _Size, quantize: str) -> torch.dtype:
    """auto: bfloat16 where it is fast and the model not small, or where float32 does not fit.

    Never float16 unasked: Qwen's and Gemma's activations leave its range.
    """
    if name != "auto":
        return getattr(torch, name)
    is_small = device.type == "cpu" and size.estimate("none", 4) <= _SMALL
    if has_fast_bfloat16(str(device)) and not is_small:
        return torch.bfloat16
    fits = SPARE * size.estimate(quantize, 4) <= measure_free_memory(str(device))
    return torch.float32 if fits else torch.bfloat16


def _check_memory(
    checkpoint: Checkpoint,
    size: _Size,
    quantize: str,
    kinds: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """kinds: of QUANTIZE, those that the checkpoint can be loaded with."""
    needed = SPARE * size.estimate(quantize, dtype.itemsize)
    free = measure_free_memory(str(device))
    if needed <= free:
        return
    smaller = [kind for kind in kinds if SPARE * size.estimate(kind, 2) <= free]
    mend = f"--dtype bfloat16 --quantize {smaller[0]} would fit" if smaller else "take a smaller model"
    raise ConfigError(
        f"{checkpoint.name} needs about {needed / 1e9:.1f} GB as {str(dtype).removeprefix('torch.')} with "
        f"--quantize {quantize}, but {device} has {free / 1e9:.1f} GB free; {mend} (`models` lists sizes)"
    )


def _find_end_token(model, tokenizer, frame: AnswerFrame, checkpoint: Checkpoint) -> int:
    """The token that ends an answer: what the chat template writes there, if one more place in the folder says so.

    Where it writes nothing: the token that begins the next question, if generation_config ends with it, as GLM's does.
    Without either, tokenizer and generation_config must agree.
    """
    file = "generation_config.json" if (checkpoint.folder / "generation_config.json").is_file() else CONFIG
    stated = model.generation_config.eos_token_id
    known = stated if isinstance(stated, list) else [stated] if stated is not None else []
    own = tokenizer.eos_token_id
    told = frame.next_token_id if frame.next_token_id in known else frame.end_token_id
    if told is not None and told in (*known, own):
        return told
    if told is None and own is not None and (own in known or not known):
        return own
    ends = [f"the tokenizer ends an answer with {tokenizer.eos_token!r} ({own})", f"{file} with {stated}"]
    if told is not None:
        ends.append(f"the chat template with {tokenizer.convert_ids_to_tokens(told)!r} ({told})")
    raise ConfigError(
        f"{checkpoint.folder} contradicts itself: {', '.join(ends)}; make eos_token in tokenizer_config.json and "
        f"eos_token_id in generation_config.json the one that the model was trained with"
    )
