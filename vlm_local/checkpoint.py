"""A model folder in Hugging Face layout: its family, its quantisation, what we know of it. Knows no torch."""

import hashlib
import shutil
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError
from vlm_local.weights import ADAPTER, CONFIG, check_weights, list_weights, read_json

SIDECAR = "vlm_local.json"

_FAMILY_OF_TYPE = {
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "qwen3_vl_moe": "qwen3-vl",
    "qwen3_5": "qwen3.5",
    "qwen3_5_moe": "qwen3.5",
    "paligemma": "paligemma",
    "gemma3": "gemma3",
    "gemma4": "gemma4",
    "glm4v": "glm4v",
    "glm46v": "glm4v",
    "lfm2_vl": "lfm2-vl",
    "internvl": "internvl",
    "mistral3": "mistral3",
    "molmo2": "molmo2",
    "idefics3": "smolvlm",
    "smolvlm": "smolvlm2",
}
# What transformers loads by the folder's own configuration, each through the package that stands beside it.
BITSANDBYTES = ("bitsandbytes-4bit", "bitsandbytes-8bit")
QUANT_METHODS = (*BITSANDBYTES, "fp8", "compressed-tensors", "awq", "gptq")
_POINTER = b"version https://git-lfs"
_SIDECAR_TYPES = {
    "trained": bool,
    "decide": str,
    "temperature": (int, float),
    "history": int,
    "contrast": (int, float),
    "marks": str,
    "frames": int,
    "frame_every": int,
    "frame_choice": str,
    "think": str,
    "think_every": int,
    "think_tokens": int,
    "steps_per_phrase": int,
    "prompt": str,
    "embodiment": str,
    "results": dict,
    "training": dict,
}
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")  # what a model's folder consists of
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_HASH_WHOLE = 256 << 20  # bytes of weights up to which every byte is hashed
_HASH_BLOCKS, _HASH_BLOCK = 64, 64 << 10


@dataclass(frozen=True)
class Checkpoint:
    """A whole model folder, or a LoRA adapter's folder with its whole base.

    name: how it was asked for. family: as find_family names it. adapter: the adapter's folder or None.
    sidecar: contents of vlm_local.json (_SIDECAR_TYPES says which fields), empty without one. An adapter's own
        counts, not its base's.
    quant_method: how the model's weights are quantised in the folder, one of QUANT_METHODS, else None.
    """

    name: str
    folder: Path
    family: str
    sidecar: Mapping[str, Any]
    adapter: Path | None = None
    quant_method: str | None = None

    @cached_property
    def sha256(self) -> str:
        """As hash_weights, of the adapter's, too."""
        return hash_weights(self.folder, *([self.adapter] if self.adapter else []))


def open_checkpoint(folder: Path, name: str | None = None, adapter: Path | None = None) -> Checkpoint:
    """Check a folder and describe it.

    Raises ConfigError, in a sentence that names the file, for a folder that is no supported model,
    lacks files, or holds truncated ones.
    """
    for place in (folder, *([adapter] if adapter else [])):
        _refuse_pointers(place)
    inner = sorted(file.parent.name for name in (CONFIG, ADAPTER) for file in folder.glob(f"*/{name}"))
    if inner and not (folder / CONFIG).is_file():
        raise ConfigError(
            f"{folder} has no {CONFIG}, but folders that have one or an adapter: give {' or '.join(inner)}"
        )
    family, quant_method = read_kind(folder)
    check_processor_files(folder, [file.name for file in folder.iterdir() if file.is_file()])
    check_weights(folder, quant_method)
    owner = adapter or folder
    sidecar = read_sidecar(owner)
    if adapter:
        check_weights(adapter, None)
        _check_base(folder, adapter, (sidecar.get("training") or {}).get("base_sha256"))
    return Checkpoint(name or owner.name, folder, family, sidecar, adapter, quant_method)


def _check_base(base: Path, adapter: Path, expected: Any) -> None:
    """Refuse weights that are not those which the adapter was trained on, where `train finetune` wrote them down."""
    if expected is not None and expected != (found := hash_weights(base)):
        raise ConfigError(
            f"{adapter / SIDECAR} says that it was trained on weights with the sha256 {str(expected)[:12]}..., "
            f"but those of its base {base} have {found[:12]}...: expected the same config.json and safetensors files. "
            f'Put them there again, or take "base_sha256" out of the file to serve the adapter on these weights'
        )


def read_kind(folder: Path) -> tuple[str, str | None]:
    """Family and quant_method by a folder's config.json; raises ConfigError where either is not understood."""
    config = read_json(folder / CONFIG)
    return find_family(config, folder), find_quant_method(config, folder)


def check_processor_files(place: Path | str, names: Collection[str]) -> None:
    """Refuse a model whose files, which have these names, lack a tokenizer or an image processor."""
    for wanted, what in ((TOKENIZER_FILES, "tokenizer"), (_IMAGE_FILES, "image processor")):
        if not set(wanted).intersection(names):
            own = ", and tekken.json is Mistral's own format" if "tekken.json" in names else ""
            raise ConfigError(
                f"{place} holds no {what} ({' or '.join(wanted)}){own}; copy or download the whole model, or "
                f"one of others' copies of it that has these files"
            )


def _refuse_pointers(folder: Path) -> None:
    """Refuse what git-lfs writes for a file that it has not fetched, weights or tokenizer."""
    for file in sorted(file for pattern in FILES for file in folder.glob(pattern) if file.is_file()):
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise ConfigError(f"{file} is a git-lfs pointer, not the file; run `git lfs pull` in {folder}")


def find_quant_method(config: Mapping[str, Any], folder: Path) -> str | None:
    """One of QUANT_METHODS by config.json's quantization_config, None without one. Raises ConfigError."""
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    names = ("quantization_config", "compression_config")  # the latter in older compressed-tensors folders
    stored = next((place[name] for place in places for name in names if place.get(name) is not None), None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if isinstance(stored, dict) and method in (None, "bitsandbytes"):
        bits = [name for name in ("4bit", "8bit") if stored.get(f"load_in_{name}")]
        method = f"bitsandbytes-{bits[0]}" if bits else method
    if method not in QUANT_METHODS:
        raise ConfigError(
            f"{folder / CONFIG}: the weights are quantised by quant_method {method!r}; understood are "
            f"{', '.join(QUANT_METHODS)}. Take the model's unquantised folder, with --quantize where it is too large"
        )
    return method


def find_family(config: Mapping[str, Any], folder: Path) -> str:
    """Family by config.json's model_type; PaliGemma's two differ by their language model."""
    model_type = config.get("model_type")
    family = _FAMILY_OF_TYPE.get(model_type) if isinstance(model_type, str) else None
    if model_type == "internvl_chat":
        raise ConfigError(
            f"{folder / CONFIG} says model_type 'internvl_chat', which brings code of its own; take the repository of "
            "the same model whose name ends in -hf"
        )
    if family is None:
        raise ConfigError(
            f"{folder / CONFIG} says model_type {model_type!r}; supported are {', '.join(_FAMILY_OF_TYPE)}. Any other "
            "model drives a robot by --engine openai, where vLLM or another server answers for it (docs/engines.md)"
        )
    text = config.get("text_config")
    is_second = family == "paligemma" and isinstance(text, dict) and text.get("model_type") == "gemma2"
    return "paligemma2" if is_second else family


def read_sidecar(folder: Path) -> dict[str, Any]:
    """vlm_local.json of a folder, {} without one; relative files of a prompt or an embodiment stand in the folder."""
    file = folder / SIDECAR
    if not file.is_file():
        return {}
    sidecar = read_json(file)
    for key, kind in _SIDECAR_TYPES.items():
        value = sidecar.get(key)
        is_wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if value is not None and is_wrong:
            raise ConfigError(f"{file}: {key!r} is {value!r}, which is of the wrong type")
    for key in ("prompt", "embodiment"):
        if sidecar.get(key) and (folder / sidecar[key]).is_file():
            sidecar[key] = str(folder / sidecar[key])
    return sidecar


def copy_around_weights(source: Path, folder: Path) -> None:
    """Copy what a model's folder holds beside its weights; not what was trained or recorded in folders of it."""
    for pattern in FILES:
        for file in (*source.glob(pattern), *source.glob(f"additional_chat_templates/{pattern}")):
            if ".safetensors" not in file.name:
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def hash_weights(*folders: Path) -> str:
    """sha256 of config.json, adapter_config.json and the safetensors files that are loaded, by name.

    Weights above 256 MiB are sampled, so that a start stays quick: length, header and 64 evenly
    spaced blocks of 64 KiB of each file.
    """
    digest = hashlib.sha256()
    for folder in folders:
        files = sorted([*(file for name in (CONFIG, ADAPTER) for file in folder.glob(name)), *list_weights(folder)])
        whole = sum(file.stat().st_size for file in files) <= _HASH_WHOLE
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            _hash_file(digest, file, whole)
    return digest.hexdigest()


def _hash_file(digest, file: Path, whole: bool) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if whole or file.suffix != ".safetensors" or size <= _HASH_BLOCK:
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        start = stream.read(8)
        digest.update(start + stream.read(struct.unpack("<Q", start)[0]))
        for block in range(_HASH_BLOCKS):
            stream.seek((size - _HASH_BLOCK) * block // (_HASH_BLOCKS - 1))
            digest.update(stream.read(_HASH_BLOCK))
