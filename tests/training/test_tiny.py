"""The embedded checkpoint's folder: tokenizer, picture size, weights from a seed."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from tests.tiny_models import tiny_checkpoint
from vlm_local.checkpoint import open_checkpoint
from vlm_local.cli import main
from vlm_local.decoding.trie import check_prefixes, tokenize_sentences
from vlm_local.engines.processing import Processing
from vlm_local.engines.processors import load_processor
from vlm_local.files import find_shipped
from vlm_local.primitives import list_phrases
from vlm_local.prompts import build_prompt, load_template
from vlm_local.training.tiny import SIDECAR, write_tiny
from vlm_local.types import GenerationRequest, Observation

SHIPPED = find_shipped("checkpoints") / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny(path, seed=3)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_every_word_of_every_phrase_is_one_token(tokenizer):
    for phrase in list_phrases():
        assert len(tokenizer.tokenize(phrase)) == len(re.findall(r"\w+|,", phrase))


def test_phrases_are_spelled_alike_wherever_they_stand(tokenizer):
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokens = tokenize_sentences(tokenizer, list_phrases(), start, tokenizer.eos_token_id)
    check_prefixes(list_phrases(), tokens)


@pytest.mark.parametrize("text", ["x0 y-349 z399 w-180 g100", "x253 y12 z7 w0 g55"])
def test_a_measured_number_is_one_token(tokenizer, text):
    assert len(tokenizer.tokenize(text)) == 5


def test_anything_else_can_be_said_too(tokenizer):
    text = "Bring the Öl-can x999 y-1234, now: 12.5 mm! 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_neighbouring_numbers_begin_as_neighbours(folder, tokenizer):
    table = AutoModelForImageTextToText.from_pretrained(folder).get_input_embeddings().weight.detach()
    here, near, far = table[tokenizer.convert_tokens_to_ids(["x200", "x203", "x320"])]
    assert (here - near).norm() < 0.4 * (here - far).norm()


def test_the_seed_gives_the_weights(folder, tmp_path):
    write_tiny(tmp_path / "same", seed=3)
    write_tiny(tmp_path / "other", seed=4)
    same, other, here = (
        (path / "model.safetensors").read_bytes() for path in (tmp_path / "same", tmp_path / "other", folder)
    )
    assert same == here != other


def test_the_shipped_folder_is_of_this_code(folder):
    """Weights and results change with training; everything else must be as `init-tiny` writes it."""
    changing = {"model.safetensors", "vlm_local.json", "README.md"}
    names = {path.name for path in folder.iterdir()} - changing
    assert names == {path.name for path in SHIPPED.iterdir()} - changing
    for name in names:
        ours, theirs = ((path / name).read_text() for path in (folder, SHIPPED))
        assert _without_version(ours) == _without_version(theirs), name
    assert (SHIPPED / "model.safetensors").stat().st_mode & 0o777 == 0o644


def _without_version(text):
    return re.sub(r'"transformers_version": "[^"]*"', "", text)


@pytest.mark.parametrize("size", [16, 128, 256, 640])
def test_a_square_picture_is_sixteen_tokens(folder, size):
    processing = Processing(load_processor(folder, "qwen2-vl"), "qwen2-vl", torch.float32)
    observation = Observation(np.zeros((size, size, 3), np.uint8), "reach the red block", np.zeros(7))
    prompt = build_prompt(load_template(folder / "prompt.txt"), observation)
    prepared = processing.prepare(GenerationRequest(observation.image, prompt, ("stop",)))
    assert prepared.vision["pixel_values"].shape == (64, 1536)
    assert len(prepared.input_ids) == 30  # 4 words, 16 of the image, 5 numbers, 5 marks


def test_a_folder_in_use_is_not_written_over(tmp_path, capsys):
    (tmp_path / "model.safetensors").write_text("trained for weeks")
    assert main(["train", "init-tiny", "--out", str(tmp_path)]) == 2
    assert "holds something already" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_text() == "trained for weeks"


def test_a_mean_lies_between_the_models(folder, tmp_path, capsys):
    write_tiny(tmp_path / "other", seed=4)
    out = tmp_path / "mean"
    assert main(["train", "mean", str(folder), str(tmp_path / "other"), "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"out": str(out), "models": 2}
    one, other, mean = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "other", out))
    assert one.keys() == mean.keys()
    for name, weights in mean.items():
        torch.testing.assert_close(weights, (one[name] + other[name]) / 2)
    assert json.loads((out / "vlm_local.json").read_text()) == SIDECAR | {"trained": True}


@pytest.mark.parametrize(
    ("others", "said"), [([], "two or more"), (["qwen2-vl"], "other weights"), (["nothing"], "nothing")]
)
def test_no_mean_of_one_model_or_of_two_architectures(folder, tmp_path, capsys, others, said):
    models = [str(folder), *(str(tiny_checkpoint(name) if name == "qwen2-vl" else tmp_path / name) for name in others)]
    assert main(["train", "mean", *models, "--out", str(tmp_path / "mean")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "mean").exists()


def test_a_mean_of_models_without_our_own_file_is_a_model(tmp_path):
    models = [str(tiny_checkpoint("qwen2-vl", seed)) for seed in (0, 1)]
    assert main(["train", "mean", *models, "--out", str(tmp_path / "mean")]) == 0
    first, mean = (open_checkpoint(path).sha256 for path in (Path(models[0]), tmp_path / "mean"))
    assert first != mean and not list((tmp_path / "mean").glob("*.index.json"))


def test_no_mean_of_an_adapter_or_of_quantised_weights(tmp_path, capsys):
    whole = tiny_checkpoint("qwen2-vl")
    quantised = shutil.copytree(whole, tmp_path / "quantised")
    config = json.loads((quantised / "config.json").read_text())
    packed = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    weights = safetensors.torch.load_file(quantised / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(weights, quantised / "model.safetensors", {"format": "pt"})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(whole / "model.safetensors", adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(whole)}))
    for other in (quantised, adapter):
        assert main(["train", "mean", str(whole), str(other), "--out", str(tmp_path / "mean")]) == 2
        said = capsys.readouterr().err
        assert str(other) in said and "whole models" in said and not (tmp_path / "mean").exists()
