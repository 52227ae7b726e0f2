import json
import os
import shutil
import struct

import pytest

from tests.tiny_models import edit_json, tiny_checkpoint
from tests.tiny_models.names import FAMILIES
from vlm_local.checkpoint import open_checkpoint
from vlm_local.errors import ConfigError
from vlm_local.weights import count_weights, estimate_memory, read_header


@pytest.mark.parametrize("family", FAMILIES)
def test_the_family_is_read_from_the_config(family):
    assert open_checkpoint(tiny_checkpoint(family)).family == family.removesuffix("-moe")


def _replace_by_fifo(file):
    file.unlink()
    os.mkfifo(file)


DEEP_HEADER = struct.pack("<Q", 200_000) + b"[" * 200_000


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def _replace(folder, name):
    (folder / "model.safetensors").rename(folder / name)


def _shard_twice(folder):
    """An index of two shards, one of another save of the same model."""
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shutil.copy(folder / "model.safetensors", folder / names[0])
    _replace(folder, names[1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))


def _point_to_lfs(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "is no model folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("[" * 200_000), "nested too deeply"),
        (lambda folder: _replace_by_fifo(folder / "config.json"), "not a regular file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(DEEP_HEADER), "no whole safetensors file"),
        (lambda folder: edit_json(folder / "config.json", model_type="llava"), "llava.*supported are"),
        (lambda folder: edit_json(folder / "config.json", model_type="internvl_chat"), "whose name ends in -hf"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "no image processor"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "can run code"),
        (lambda folder: _replace(folder, "pytorch_model-00001-of-00002.bin"), "has pytorch_model-00001.*can run code"),
        (lambda folder: _replace(folder, "model-q4.gguf"), "has model-q4.gguf, which is llama.cpp's"),
        (
            lambda folder: _replace(folder, "model.fp16.safetensors"),
            "model.fp16.safetensors, but nothing that says",
        ),
        (lambda folder: _replace(folder, "consolidated.safetensors"), "which is Mistral's own format: take the model"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "tekken.json"), "and tekken.json is Mistral's own"),
        (lambda folder: _replace(folder, "global_step500"), "DeepSpeed.*zero_to_fp32.py"),
        (lambda folder: _replace(folder, "training_args.bin"), "copy or download the whole model"),
        (
            lambda folder: (folder / "adapter_config.json").write_text("{}"),
            "remove that file from a model",
        ),
        (lambda folder: _point_to_lfs(folder / "tokenizer.json"), r"tokenizer\.json is a git-lfs pointer"),
        (lambda folder: _shard_twice(folder), r"00002\.safetensors holds .*, as model-00001"),
        (lambda folder: _truncate(folder / "model.safetensors"), "is truncated"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "no whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100), "no whole safetensors file"),
        (lambda folder: _point_to_lfs(folder / "model.safetensors"), "git lfs pull"),
        (lambda folder: (folder / "vlm_local.json").write_text('{"history": "two"}'), "history.*wrong type"),
        (lambda folder: (folder / "vlm_local.json").write_text('{"history": true}'), "history.*wrong type"),
        (
            lambda folder: (
                (folder / "model.safetensors")
                .rename(folder / "model.safetensors.index.json")
                .write_text('{"weight_map": {"a": "model-2.safetensors"}}')
            ),
            "lacks model-2.safetensors",
        ),
    ],
)
def test_a_spoilt_folder_is_refused_with_a_sentence(folder, spoil, reason):
    spoil(folder)
    with pytest.raises(ConfigError, match=reason):
        open_checkpoint(folder)


def test_a_folder_of_models_names_them(folder):
    """As peft writes several adapters, and trainers their checkpoints."""
    for name in ("mine", "checkpoint-500"):
        (folder.parent / "runs" / name).mkdir(parents=True)
    (folder.parent / "runs" / "mine" / "adapter_config.json").write_text("{}")
    (folder.parent / "runs" / "checkpoint-500" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has no config\.json, .*: give checkpoint-500 or mine"):
        open_checkpoint(folder.parent / "runs")


def test_the_hash_tells_weights_apart_and_leaves_the_sidecar_out(folder):
    before = open_checkpoint(folder).sha256
    (folder / "vlm_local.json").write_text('{"trained": true}')
    (folder / "consolidated.safetensors").write_bytes(b"the same in a format that is not loaded")
    assert open_checkpoint(folder).sha256 == before
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert open_checkpoint(folder).sha256 != before
    assert open_checkpoint(tiny_checkpoint("qwen2-vl", 1)).sha256 != before


def test_a_large_file_is_hashed_by_its_header_and_samples(folder, monkeypatch):
    monkeypatch.setattr("vlm_local.checkpoint._HASH_WHOLE", 1000)
    monkeypatch.setattr("vlm_local.checkpoint._HASH_BLOCK", 64)
    file = folder / "large.safetensors"
    _replace(folder, file.name)
    (folder / "small.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")  # shorter than a sample, beside it
    shards = {"weight_map": {"a": file.name, "b": "small.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    before = open_checkpoint(folder).sha256
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # in the last sample
    file.write_bytes(data)
    assert open_checkpoint(folder).sha256 != before


def test_a_prompt_file_of_the_sidecar_stands_in_the_folder(folder):
    (folder / "mine.txt").write_text("[before]\n$instruction\n[after]\n\n")
    (folder / "vlm_local.json").write_text('{"prompt": "mine.txt"}')
    assert open_checkpoint(folder).sidecar["prompt"] == str(folder / "mine.txt")


def test_memory_follows_the_weights():
    folder = tiny_checkpoint("qwen2-vl")
    linear, rest = count_weights(folder)
    header = read_header(folder / "model.safetensors")
    assert 4 * (linear + rest) == max(tensor["data_offsets"][1] for tensor in header.values())
    none, half, quarter = (estimate_memory(linear, rest, kind) for kind in ("none", "8bit", "4bit"))
    assert none == 2 * (linear + rest) > half > quarter > 2 * rest
