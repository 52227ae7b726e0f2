"""Real architectures with random weights, made in memory: timings need the shape, not the training."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers.initialization import no_init_weights

from vlm_local.decoding.families import LoadedModel
from vlm_local.decoding.prepared import PreparedPicture, PreparedRequest
from vlm_local.engines.loading import multiply_patches, set_up_device
from vlm_local.errors import ConfigError
from vlm_local.types import GenerationRequest, Picture


@dataclass(frozen=True)
class _Shape:
    """What tells the sizes of a family apart, as their config.json have it."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    shares_embedding: bool


_SHAPES = {
    "qwen2-vl-2b": _Shape("qwen2-vl", 1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2-vl-7b": _Shape("qwen2-vl", 3584, 18944, 28, 28, 4, 152_064, False),
    "qwen3.5-4b": _Shape("qwen3.5", 2560, 9216, 32, 16, 4, 248_320, True),
    # Nobody's: to try a benchmark itself.
    "small": _Shape("qwen2-vl", 256, 512, 28, 2, 1, 151_936, True),
    "small-qwen3.5": _Shape("qwen3.5", 256, 512, 4, 2, 1, 151_936, True),
}
SHAPES = tuple(_SHAPES)

_IMAGE, _END, _FIRST_TEXT = 151_655, 151_645, 1_000
# The shipped chat prompt under Qwen2's tokenizer: tokens before and behind a picture, and the picture's side.
_BEFORE, _SIDE, _AFTER = 258, 256, 72
_CHARACTERS = 3  # a token of an example's text has so many: names and numbers
# How Qwen2's tokenizer spells the movement phrases: the same tokens a phrase, under other numbers.
_PIECES = (
    *(",", "stop", "move", "til", "t", "rotate", "close", "open", " forward", " backward", " left", " right", " up"),
    *(" down", " tilt", " rotate", " clockwise", " count", "erc", "lock", "wise", " close", " open", " gri", "pper"),
)


def build_shape(name: str, layers: int | None, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Random weights. layers: of language model and vision tower each; None for all.

    Raises ConfigError for a name that is not in SHAPES.
    """
    if name not in _SHAPES:
        raise ConfigError(f"--shape {name}: the known shapes are {', '.join(SHAPES)}")
    shape = _SHAPES[name]
    text = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "bos_token_id": None,
        "eos_token_id": _END,
    }
    describe, kind = _FAMILIES[shape.family]
    config = describe(text, layers, image_token_id=_IMAGE, tie_word_embeddings=shape.shares_embedding)
    set_up_device(device)
    with no_init_weights(), device:
        model = kind._from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    multiply_patches(model)
    _fill(model)
    tokenizer = _build_tokenizer(shape.vocabulary)
    model.generation_config = transformers.GenerationConfig(eos_token_id=_END, pad_token_id=_END)
    return LoadedModel(model, tokenizer, None, shape.family, device, dtype, _END)


def _describe_qwen2(text: dict[str, Any], layers: int | None, **options: Any) -> transformers.PreTrainedConfig:
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = {"depth": layers or 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": text["hidden_size"]}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision | {"mlp_ratio": 4}, **options)


def _describe_qwen35(text: dict[str, Any], layers: int | None, **options: Any) -> transformers.PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e7, "mrope_section": [11, 11, 10], "mrope_interleaved": True}
    text |= {"rope_parameters": rope | {"partial_rotary_factor": 0.25}, "head_dim": 256}
    vision = {"depth": layers or 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    vision |= {"out_hidden_size": text["hidden_size"]}
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, **options)


_FAMILIES: dict[str, tuple[Callable[..., Any], Any]] = {
    "qwen2-vl": (_describe_qwen2, transformers.Qwen2VLForConditionalGeneration),
    "qwen3.5": (_describe_qwen35, transformers.Qwen3_5ForConditionalGeneration),
}


def _fill(model) -> None:
    """Normal numbers of the usual width, repeated: two billion fresh ones would take minutes."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(1_000_003, generator=generator).to(model.device, model.dtype)
    for name, tensor in model.named_parameters():
        if "norm" in name or "ln_q" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            flat = tensor.view(-1)
            for first in range(0, len(flat), len(noise)):
                part = flat[first : first + len(noise)]
                part.copy_(noise[: len(part)])


def _build_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    words = [
        *(piece.replace(" ", "\u0120") for piece in _PIECES),
        "<unknown>",
        *(f"<unused{index}>" for index in range(vocabulary)),
    ]
    words.insert(_END, "<end>")
    del words[vocabulary:]
    scores = [-1.0] * len(_PIECES) + [-100.0] * (len(words) - len(_PIECES))
    tokenizer = Tokenizer(Unigram(list(zip(words, scores, strict=True)), unk_id=len(_PIECES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def prepare_for_shape(loaded: LoadedModel, request: GenerationRequest) -> PreparedRequest:
    """The request's text as random tokens of the shipped prompt's length, its images as random patches.

    The last token is always the same, as a chat template's is: a decoder keeps one trie of the phrases for it.
    """
    prompt = request.prompt
    image = np.full(_count_patches(loaded) ** 2 // 4, _IMAGE)
    before = [_draw_tokens(prompt.before, _BEFORE)]
    for part in prompt.earlier:
        before.append(_draw_tokens(part, len(part) // _CHARACTERS) if isinstance(part, str) else image)
    length = sum(map(len, before))
    input_ids = np.concatenate([*before, image, _draw_tokens(prompt.after, _AFTER - 1), [_FIRST_TEXT]])
    vision = _draw_patches(loaded, request.image) | {
        "mm_token_type_ids": torch.from_numpy(input_ids == _IMAGE).long()[None]
    }
    earlier = [
        PreparedPicture(picture.key, len(image), _draw_patches(loaded, picture.pixels)) for picture in prompt.pictures
    ]
    key = Picture(request.image).key
    return PreparedRequest(request, torch.from_numpy(input_ids), length, vision, tuple(earlier), key)


def _draw_patches(loaded: LoadedModel, pixels: np.ndarray) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(int(pixels[0, 0, 0]))
    side = _count_patches(loaded)
    patches = torch.randn((side**2, 2 * 3 * loaded.model.config.vision_config.patch_size**2), generator=generator)
    return {"pixel_values": patches.to(loaded.dtype), "image_grid_thw": torch.tensor([(1, side, side)])}


def _count_patches(loaded: LoadedModel) -> int:
    """Along a side of the picture; an even number, because two by two become a token."""
    return 2 * round(_SIDE / (2 * loaded.model.config.vision_config.patch_size))


def _draw_tokens(text: str, count: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).integers(_FIRST_TEXT, _FIRST_TEXT + 100_000, count)
