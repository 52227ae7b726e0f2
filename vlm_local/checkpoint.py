"""A model folder in Hugging Face layout: what it holds, whether it is whole, how much memory it takes.

Reads config and safetensors headers only; knows no torch.
"""

import hashlib
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError
from vlm_local.files import MAX_JSON_BYTES, parse_json, read_json_object

CONFIG, ADAPTER, SIDECAR = "config.json", "adapter_config.json", "vlm_local.json"

_FAMILY_OF_TYPE = {
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "paligemma": "paligemma",
    "idefics3": "smolvlm",
    "smolvlm": "smolvlm2",
}
# What transformers loads by the folder's own configuration, each through the package that stands beside it.
QUANT_METHODS = ("bitsandbytes-4bit", "bitsandbytes-8bit", "fp8", "compressed-tensors", "awq", "gptq")
_FLOATS = ("F64", "F32", "F16", "BF16")
# What may lie there instead of safetensors that transformers loads -> what it is, and what to do.
_OTHER_WEIGHTS = {
    "*.bin": "which can run code: save the model as safetensors, where it came from",
    "*.pt": "which can run code: save the model as safetensors, where it came from",
    "*.gguf": "which is llama.cpp's: take the model's own folder, or serve it by llama.cpp and --engine openai",
    "*.onnx": "which is for ONNX: take the model's own folder",
    "onnx": "which is for ONNX: take the model's own folder",
    "global_step*": "which DeepSpeed has cut into parts: run its zero_to_fp32.py with --safe_serialization",
    "*fsdp*": "which FSDP has cut into parts: run `accelerate merge-weights`",
    "*.safetensors": "but nothing that says how it fits in: copy or download the whole model with its index",
}
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")
_POINTER = b"version https://git-lfs"
_BUFFERS = ("position_ids", "inv_freq")  # old files hold them; transformers computes them again
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
}
FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")  # what a model's folder consists of
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
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
        """Of config.json and the safetensors files, by name; of the adapter's, too.

        Weights above 256 MiB are sampled, so that a start stays quick: length, header and 64 evenly
        spaced blocks of 64 KiB of each file.
        """
        digest = hashlib.sha256()
        for folder in (self.folder, *([self.adapter] if self.adapter else [])):
            files = sorted([*folder.glob("*config.json"), *folder.glob("*.safetensors")])
            files = [file for file in files if file.suffix == ".safetensors" or file.name in (CONFIG, ADAPTER)]
            whole = sum(file.stat().st_size for file in files) <= _HASH_WHOLE
            for file in files:
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                _hash_file(digest, file, whole)
        return digest.hexdigest()


def open_checkpoint(folder: Path, name: str | None = None, adapter: Path | None = None) -> Checkpoint:
    """Check a folder and describe it.

    Raises ConfigError, in a sentence that names the file, for a folder that is no supported model,
    lacks files, or holds truncated ones.
    """
    for place in (folder, *([adapter] if adapter else [])):
        _refuse_pointers(place)
    config = _read_json(folder / CONFIG)
    family = find_family(config, folder)
    for names, what in ((_TOKENIZER_FILES, "tokenizer"), (_IMAGE_FILES, "image processor")):
        if not any((folder / file).is_file() for file in names):
            raise ConfigError(f"{folder} holds no {what} ({' or '.join(names)}); copy or download the whole model")
    quant_method = find_quant_method(config, folder)
    _check_weights(folder, quant_method)
    if adapter:
        _check_weights(adapter, None)
    owner = adapter or folder
    return Checkpoint(name or owner.name, folder, family, read_sidecar(owner), adapter, quant_method)


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


def _check_weights(folder: Path, quant_method: str | None) -> None:
    """Refuse weights that are quantised where the config does not say how, or are not where it does, and any twice."""
    place: dict[str, Path] = {}
    is_packed = False
    for file in list_weights(folder):
        for name, tensor in read_header(file).items():
            if name in place:
                raise ConfigError(f"{file} holds {name}, as {place[name].name} does; copy or download the model again")
            place[name] = file
            if tensor["dtype"] in _FLOATS or name.endswith(_BUFFERS):
                continue
            is_packed = True
            if quant_method is None:
                raise ConfigError(
                    f"{file}: {name} is stored as {tensor['dtype']}, so the weights are quantised, but the folder's "
                    f"config has no quantization_config that says how; take the model's unquantised folder"
                )
    if quant_method and not is_packed:
        raise ConfigError(
            f"{folder / CONFIG} says that the weights are quantised ({quant_method}), but all are plain floats, as after "
            f"a merge of an adapter; take quantization_config out of the file"
        )


def find_family(config: Mapping[str, Any], folder: Path) -> str:
    """Family by config.json's model_type; PaliGemma's two differ by their language model."""
    model_type = config.get("model_type")
    family = _FAMILY_OF_TYPE.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ConfigError(
            f"{folder / CONFIG} says model_type {model_type!r}; supported are {', '.join(_FAMILY_OF_TYPE)}"
        )
    text = config.get("text_config")
    is_second = family == "paligemma" and isinstance(text, dict) and text.get("model_type") == "gemma2"
    return "paligemma2" if is_second else family


def list_weights(folder: Path) -> list[Path]:
    """The safetensors files that are loaded of a model or adapter folder; raises ConfigError when one is missing.

    As in transformers, a single file counts before an index, where both are there.
    """
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if (folder / ADAPTER).is_file():
        names = ["adapter_model.safetensors"]
    elif not (folder / names[0]).is_file() and index.is_file():
        names = _list_shards(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ConfigError(f"{folder} lacks {', '.join(missing) or 'weights'}; {_explain_missing(folder)}")
    return [folder / name for name in names]


def _explain_missing(folder: Path) -> str:
    if (folder / ADAPTER).is_file() and next(folder.glob("model*.safetensors"), None):
        return f"{ADAPTER} makes it an adapter: remove that file from a model that is merged"
    for pattern, mend in _OTHER_WEIGHTS.items():
        if found := next((file for file in sorted(folder.glob(pattern)) if file.name not in _NO_WEIGHTS), None):
            return f"it has {found.name}, {mend}"
    return "copy or download the whole model"


def _list_shards(index: Path) -> list[str]:
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) and "/" not in name for name in shards.values()):
        raise ConfigError(f"{index}: expected weight_map to name a file of the folder for each tensor")
    return sorted(set(shards.values()))


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape", "data_offsets"} of a safetensors file whose length fits.

    Format: 8 bytes little-endian header length, JSON header, data
    (https://huggingface.co/docs/safetensors/index#format). Raises ConfigError for anything else.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            header = parse_json(stream.read(length)) if 8 + length <= size and length <= MAX_JSON_BYTES else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ConfigError(f"{file} ({size} bytes) is no whole safetensors file; copy or download it again")
    header.pop("__metadata__", None)
    if not all(map(_is_tensor, header.values())):
        raise ConfigError(f"{file}: its header does not describe tensors; copy or download it again")
    expected = 8 + length + max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    if size != expected:
        raise ConfigError(f"{file} is truncated: its header tells of {expected} bytes, there are {size}; copy it again")
    return header


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    numbers = entry.get("shape"), entry.get("data_offsets")
    are_numbers = all(isinstance(each, list) and all(type(n) is int for n in each) for each in numbers)
    return are_numbers and len(entry["data_offsets"]) == 2


def estimate_memory(linear: int, rest: int, quantize: str, item_bytes: int = 2) -> int:
    """Bytes of loaded weights: `linear` of linear layers, `rest` of all else, floats of `item_bytes`.

    bitsandbytes stores linear layers (not embeddings, norms and the head) in one byte a weight, or in
    half a byte and a float32 scale for each 64 weights.
    """
    each = {"none": item_bytes, "8bit": 1.0, "4bit": 0.5 + 4 / 64}[quantize]
    return int(linear * each + rest * item_bytes)


def count_weights(folder: Path) -> tuple[int, int]:
    """Numbers of weights in (linear layers, everything else), from the headers.

    Those of float8 count, since they are loaded as floats; those in packed integers do not.
    """
    linear = rest = 0
    for file in list_weights(folder):
        for name, tensor in read_header(file).items():
            if _is_packed(tensor):
                continue
            count = prod(tensor["shape"])
            is_linear = len(tensor["shape"]) == 2 and name.endswith("weight")
            if is_linear and not any(word in name for word in ("embed", "lm_head")):
                linear += count
            else:
                rest += count
    return linear, rest


def count_packed_bytes(folder: Path) -> int:
    """Bytes of the tensors that hold quantised weights as integers, which stay as they are in memory."""
    headers = [read_header(file) for file in list_weights(folder)]
    packed = [tensor["data_offsets"] for header in headers for tensor in header.values() if _is_packed(tensor)]
    return sum(end - begin for begin, end in packed)


def _is_packed(tensor: Mapping[str, Any]) -> bool:
    return tensor["dtype"] not in _FLOATS and not tensor["dtype"].startswith("F8")


def read_sidecar(folder: Path) -> dict[str, Any]:
    """vlm_local.json of a folder, {} without one; a relative `prompt` file stands in the folder."""
    file = folder / SIDECAR
    if not file.is_file():
        return {}
    sidecar = _read_json(file)
    for key, kind in _SIDECAR_TYPES.items():
        if sidecar.get(key) is not None and not isinstance(sidecar[key], kind):
            raise ConfigError(f"{file}: {key!r} is {sidecar[key]!r}, which is of the wrong type")
    prompt = sidecar.get("prompt")
    if prompt and (folder / prompt).is_file():
        sidecar["prompt"] = str(folder / prompt)
    return sidecar


def copy_around_weights(source: Path, folder: Path) -> None:
    """Copy what a model's folder holds beside its weights; not what was trained or recorded in folders of it."""
    for pattern in FILES:
        for file in (*source.glob(pattern), *source.glob(f"additional_chat_templates/{pattern}")):
            if ".safetensors" not in file.name:
                target = folder / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} is no model folder: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None


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
