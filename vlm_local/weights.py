"""The weights in a model's folder: which files are loaded, whether they are whole, how much memory they take.

Reads config.json and safetensors headers only; knows no torch.
"""

import fnmatch
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from vlm_local.errors import ConfigError
from vlm_local.files import MAX_JSON_BYTES, parse_json, read_json_object

CONFIG, ADAPTER = "config.json", "adapter_config.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
_SOUND = ("audio_tower.", "embed_audio.")
_BUFFERS = ("position_ids", "inv_freq")  # old files hold them; transformers computes them again
# What may lie there instead of safetensors that transformers loads -> what it is, and what to do.
_OTHER_WEIGHTS = {
    "*.bin": "which can run code: save the model as safetensors, where it came from",
    "*.pt": "which can run code: save the model as safetensors, where it came from",
    "*.gguf": "which is llama.cpp's: take the model's own folder, or serve it by llama.cpp and --engine openai",
    "*.onnx": "which is for ONNX: take the model's own folder",
    "onnx": "which is for ONNX: take the model's own folder",
    "global_step*": "which DeepSpeed has cut into parts: run its zero_to_fp32.py with --safe_serialization",
    "*fsdp*": "which FSDP has cut into parts: run `accelerate merge-weights`",
    "consolidated*.safetensors": "which is Mistral's own format: take the model*.safetensors of the same repository",
    "*.safetensors": "but nothing that says how it fits in: copy or download the whole model with its index",
}
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")


def check_weights(folder: Path, quant_method: str | None) -> None:
    """Refuse weights that are quantised where the config does not say how, or are not where it does, and any twice."""
    place: dict[str, Path] = {}
    is_quantised = False
    for file in list_weights(folder):
        for name, tensor in read_header(file).items():
            if name in place:
                raise ConfigError(f"{file} holds {name}, as {place[name].name} does; copy or download the model again")
            place[name] = file
            if tensor["dtype"] in _FLOATS or name.endswith(_BUFFERS):
                continue
            is_quantised = True
            if quant_method is None:
                raise ConfigError(
                    f"{file}: {name} is stored as {tensor['dtype']}, so the weights are quantised, but the folder's "
                    f"config has no quantization_config that says how; take the model's unquantised folder"
                )
    if quant_method and not is_quantised:
        raise ConfigError(
            f"{folder / CONFIG} says that the weights are quantised ({quant_method}), but all are plain floats, as "
            f"after a merge of an adapter; take quantization_config out of the file"
        )


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
        reason = explain_missing([file.name for file in folder.iterdir()])
        raise ConfigError(f"{folder} lacks {', '.join(missing) or 'weights'}; {reason}")
    return [folder / name for name in names]


def explain_missing(names: Iterable[str]) -> str:
    """Why a folder of such files and folders has no weights that are loaded, and what to do."""
    names = sorted(set(names).difference(_NO_WEIGHTS))
    if ADAPTER in names and fnmatch.filter(names, "model*.safetensors"):
        return f"{ADAPTER} makes it an adapter: remove that file from a model that is merged"
    for pattern, mend in _OTHER_WEIGHTS.items():
        if found := fnmatch.filter(names, pattern):
            return f"it has {found[0]}, {mend}"
    return "copy or download the whole model"


def _list_shards(index: Path) -> list[str]:
    shards = read_json(index).get("weight_map")
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
            if is_packed(tensor) or is_unread(name):
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
    tensors = [each for file in list_weights(folder) for each in read_header(file).items()]
    packed = [tensor["data_offsets"] for name, tensor in tensors if is_packed(tensor) and not is_unread(name)]
    return sum(end - begin for begin, end in packed)


def is_unread(name: str) -> bool:
    """Whether a tensor is for sounds, so that it is not loaded (Gemma 4's)."""
    return any(part in name for part in _SOUND)


def is_packed(tensor: Mapping[str, Any]) -> bool:
    return tensor["dtype"] not in _FLOATS and not tensor["dtype"].startswith("F8")


def read_json(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except FileNotFoundError:
        raise ConfigError(f"{file.parent} is no model folder: it has no {file.name}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
