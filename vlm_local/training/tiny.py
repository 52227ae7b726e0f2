"""The embedded checkpoint's folder, untrained: a few million parameters in Qwen2-VL's architecture."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlm_local.checkpoint import copy_around_weights, open_checkpoint
from vlm_local.engines.loading import load_model
from vlm_local.errors import ConfigError
from vlm_local.training import tokenizer as words
from vlm_local.weights import ADAPTER

IMAGE_PX = 128
PATCH_PX = 16
HIDDEN = 160

PROMPT = """\
[before]
$instruction
[after]
x$x_mm y$y_mm z$z_mm w$yaw_deg g$gripper_percent
"""

_FRAME = """\
[frame]
$picture
"""

# Qwen2-VL's own template also names a system, roles and line ends; here every token costs time.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}<|im_start|>{%- endif -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text | trim }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "<|im_end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}"
)

SIDECAR = {
    "trained": False,
    # A half-trained model that takes the likeliest phrase falls into cycles; so do students in training.
    "decide": "sample",
    "temperature": 0.7,
    "history": 0,
    "steps_per_phrase": 1,
    "prompt": "prompt.txt",
    "results": {},
}


def write_tiny(folder: Path, seed: int) -> None:
    """Write the whole folder: weights drawn from `seed`, tokenizer, processor, prompt and sidecar."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = words.build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model = build_model(tokenizer, seed)
    _save(model, folder)
    tokenizer.save_pretrained(folder)
    _build_image_processor().save_pretrained(folder)
    _write_json(folder / "preprocessor_config.json", {"processor_class": "Qwen2VLProcessor"})
    (folder / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    write_sidecar(folder, SIDECAR)


def show_first_picture(start: Path, folder: Path) -> Path:
    """A folder as `start`, whose prompt shows the episode's first picture before the present one."""
    shutil.copytree(start, folder, ignore=shutil.ignore_patterns("README.md"), dirs_exist_ok=True)
    fields = json.loads((start / "vlm_local.json").read_text(encoding="utf-8"))
    shown = {"frames": 1, "frame_every": 1, "frame_choice": "first", "prompt": "prompt.txt", "results": {}}
    write_sidecar(folder, {**fields, **shown})
    (folder / "prompt.txt").write_text(PROMPT.replace("[after]", f"{_FRAME}[after]"), encoding="utf-8")
    return folder


def write_weights(start: Path, model: Qwen2VLForConditionalGeneration, folder: Path, trained: bool) -> None:
    """A folder as `start` with the weights of `model`. Results and model card of the start's weights stay behind."""
    copy_around_weights(start, folder)
    sidecar = start / "vlm_local.json"
    fields = json.loads(sidecar.read_text(encoding="utf-8")) if sidecar.exists() else {}
    write_sidecar(folder, {**fields, "trained": trained, "results": {}})
    _save(model, folder)


def write_mean(folders: Sequence[Path], folder: Path) -> None:
    """A folder as the first of `folders` whose weights are the mean of all of theirs, with no results.

    Of models that were trained on from one another such a mean often keeps what each does best (Wortsman et al., Model
    soups, 2022). Raises ConfigError where their weights are not of the same names and shapes, and for adapters and
    quantised models, whose folders hold other files.
    """
    checkpoints = []
    for each in folders:
        if (each / ADAPTER).exists() or (checkpoint := open_checkpoint(each)).quant_method:
            raise ConfigError(f"{each} is an adapter or quantised; a mean needs the weights of whole models")
        checkpoints.append(checkpoint)
    models = (load_model(each, device="cpu", dtype="float32").model for each in checkpoints)  # two at a time in memory
    first = next(models)
    parameters = dict(first.named_parameters())
    for path, other in zip(folders[1:], models, strict=True):
        theirs = dict(other.named_parameters())
        if {name: each.shape for name, each in theirs.items()} != {n: p.shape for n, p in parameters.items()}:
            raise ConfigError(f"{path} has other weights than {folders[0]}: there is no mean of two architectures")
        for name, parameter in parameters.items():
            parameter.data += theirs[name].data
    for parameter in parameters.values():
        parameter.data /= len(folders)
    write_weights(folders[0], first, folder, trained=True)


def _save(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which a package would keep


def write_sidecar(folder: Path, fields: dict) -> None:
    (folder / "vlm_local.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _write_json(path: Path, more: dict) -> None:
    fields = json.loads(path.read_text(encoding="utf-8")) | more
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build_model(tokenizer, seed: int) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer))
    _spread_numbers(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def build_config(tokenizer) -> Qwen2VLConfig:
    """16 image tokens: 128 px, patches of 16 px, 2x2 merged.

    The rotary bases are small because positions are: a picture is 8 x 8 patches and 4 x 4 tokens,
    and at the usual bases most rotations would hardly turn over them.
    """
    ids = tokenizer.convert_tokens_to_ids
    return Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 480,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 4.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids(words.START),
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "dtype": "float32",
        },
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "num_heads": 4,
            "hidden_size": HIDDEN,
            "patch_size": PATCH_PX,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 10.0},
            "dtype": "float32",
        },
        image_token_id=ids(words.IMAGE),
        video_token_id=ids(words.VIDEO),
        vision_start_token_id=ids(words.VISION_START),
        vision_end_token_id=ids(words.VISION_END),
        tie_word_embeddings=True,
        dtype="float32",
    )


@torch.no_grad()
def _spread_numbers(model, tokenizer) -> None:
    """Start neighbouring numbers as neighbours, so that what is learned of one holds for the next.

    Each letter's numbers get random sinusoids of the value at wavelengths from 50 up to 2000 units,
    at the size of an ordinary embedding.
    """
    table = model.get_input_embeddings().weight
    wavelengths = torch.logspace(1.7, 3.3, 12)
    for letter, (low, high) in words.NUMBERS.items():
        head = letter if letter == "x" else f"Ġ{letter}"
        ids = tokenizer.convert_tokens_to_ids([f"{head}{value}" for value in range(low, high + 1)])
        angles = 2 * torch.pi * torch.arange(low, high + 1)[:, None] / wavelengths
        waves = torch.cat([angles.sin(), angles.cos()], dim=1) / len(wavelengths) ** 0.5
        table[ids] = 0.02 * (torch.randn(HIDDEN) + waves @ torch.randn(waves.shape[1], HIDDEN))


def _build_image_processor() -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": IMAGE_PX**2, "longest_edge": IMAGE_PX**2},
        patch_size=PATCH_PX,
        temporal_patch_size=2,
        merge_size=2,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
