"""Every family from a folder to a phrase for a picture; what loading refuses; what processing promises."""

import functools
import json
import re
import shutil
from dataclasses import replace
from time import process_time

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from tests.hearing import differ
from tests.slow import FAMILIES, slow
from tests.tiny_models import tiny_checkpoint
from tests.tiny_models.names import FAMILIES as ALL
from tests.tiny_models.names import MIXED
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.trie import tokenize_sentences
from vlm_local.engines import MAX_PIXELS, ControlTokenFilter
from vlm_local.engines.hf import HFEngine, open_hf_engine
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import MAX_PROMPT_TOKENS, Processing
from vlm_local.errors import ConfigError, RequestError
from vlm_local.grammar import load_phrase_grammar
from vlm_local.prompts import build_prompt, load_template
from vlm_local.types import GenerationRequest, Observation, Prompt
from vlm_local.weights import count_weights

PHRASES = load_phrase_grammar().sentences
NOISE = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
PROMPT = Prompt("Answer in one phrase.", "put the spoon on the towel")
REQUEST = GenerationRequest(NOISE, PROMPT, PHRASES)
QUANTISED = [("qwen2-vl", "8bit"), ("smolvlm2", "4bit")]
DENSE = [family for family in ALL if family not in MIXED]
OTHERS = [(family, bits) for family in DENSE for bits in ("8bit", "4bit") if (family, bits) not in QUANTISED]


def _generate(engine, *requests):
    return engine.generate(requests)


@functools.cache  # nothing below changes the model
def _open_processing(family):
    loaded = load_model(open_checkpoint(tiny_checkpoint(family)))
    return loaded, Processing(loaded.processor, loaded.family, loaded.dtype)


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        *((family, "none") for family in DENSE),
        *QUANTISED,
        *(slow(family, "none") for family in MIXED),
        *(slow(*case) for case in OTHERS),
    ],
)
def test_every_family_says_a_phrase_for_a_picture(family, quantize):
    checkpoint = open_checkpoint(tiny_checkpoint(family))
    loaded = load_model(checkpoint, quantize, device="cpu")
    engine = HFEngine(checkpoint, loaded, "trie", quantize, max_batch=8)
    (answer,) = _generate(engine, replace(REQUEST, posterior="exact", sentences=PHRASES[::9]))
    assert answer.sentence in PHRASES and answer.probabilities.sum() == pytest.approx(1, abs=1e-3)
    assert engine.metadata["family"] == family.removesuffix("-moe") and engine.metadata["quantize"] == quantize
    kinds = {str(parameter.dtype) for parameter in loaded.model.parameters()}
    assert {"none": "torch.float32", "8bit": "torch.int8", "4bit": "torch.uint8"}[quantize] in kinds


def test_both_decoders_answer_a_batch_in_order():
    images = [np.full((96, 96, 3), shade, np.uint8) for shade in (0, 90, 255)] + [NOISE]
    requests = [replace(REQUEST, image=image) for image in images]
    checkpoint = open_checkpoint(tiny_checkpoint("paligemma"))
    said = {
        name: [answer.sentence for answer in _generate(open_hf_engine(checkpoint, decoder=name), *requests)]
        for name in ("trie", "outlines")
    }
    assert said["trie"] == said["outlines"]


def test_a_lora_adapter_is_added_to_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    base = open_checkpoint(tiny_checkpoint("qwen2-vl"))
    plain = load_model(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(load_model(base).model, config)
    tuned.save_pretrained(tmp_path)
    loaded = load_model(open_checkpoint(base.folder, "mine", adapter=tmp_path))
    assert type(loaded.model) is type(plain.model)
    prepared = Processing(plain.processor, "qwen2-vl", plain.dtype).prepare(REQUEST)
    inputs = {"input_ids": prepared.input_ids[None], **prepared.vision}
    expected, merged, without = (each(**inputs).logits for each in (tuned, loaded.model, plain.model))
    assert torch.allclose(expected, merged, atol=1e-4) and not torch.allclose(merged, without, atol=1e-2)
    with pytest.raises(ConfigError, match="does not fit its base"):
        load_model(open_checkpoint(base.folder, "mine", adapter=_widen(tmp_path)))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="no whole safetensors file"):
        load_model(open_checkpoint(base.folder, "mine", adapter=tmp_path))


def _widen(adapter):
    """The adapter of a model that is twice as wide."""
    file = adapter / "adapter_model.safetensors"
    weights = {name: torch.cat([each, each], dim=-1) for name, each in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file)
    return adapter


@pytest.mark.parametrize("family", [family for family in ALL if family.startswith(("qwen", "glm"))])
def test_a_patch_is_seen_as_transformers_sees_it(family):
    """Each is multiplied with the weights of a convolution."""
    loaded, processing = _open_processing(family)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family)).eval()
    vision = processing.prepare(REQUEST).vision
    shown = {name: vision[name] for name in ("pixel_values", "image_grid_thw")}
    with torch.inference_mode():
        mine, expected = (each.model.get_image_features(**shown).pooler_output[0] for each in (loaded.model, theirs))
    torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-5)


def test_missing_weights_are_not_made_up(folder):
    file = folder / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights.pop(next(name for name in weights if "layers.1.mlp.up_proj" in name))
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 1 of the model's weights.*up_proj"):
        load_model(open_checkpoint(folder))


def test_the_hubs_flat_config_gives_the_same_model(folder):
    """Qwen2-VL's own repositories keep the language model's settings at the top level of config.json."""
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    flat = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (folder / "config.json").write_text(json.dumps(text | config | flat))
    request = replace(REQUEST, posterior="exact")
    (told,), (expected,) = (
        _generate(open_hf_engine(open_checkpoint(each)), request) for each in (folder, tiny_checkpoint("qwen2-vl"))
    )
    assert np.allclose(told.probabilities, expected.probabilities, atol=1e-6)


def test_a_chat_model_without_a_chat_template_is_refused(folder):
    (folder / "chat_template.json").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        load_model(open_checkpoint(folder))


def test_too_little_memory_is_said_before_loading(folder, monkeypatch):
    monkeypatch.setattr("vlm_local.engines.loading.measure_free_memory", lambda device: 300_000)
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", None)
    with pytest.raises(ConfigError, match=r"needs about .* GB .*--quantize 4bit would fit|--quantize 8bit would fit"):
        load_model(open_checkpoint(folder), dtype="float32")
    mixture = open_checkpoint(tiny_checkpoint("qwen3.5-moe"))  # whose experts no --quantize makes smaller
    for free, checkpoint in ((1000, open_checkpoint(folder)), (sum(count_weights(mixture.folder)), mixture)):
        monkeypatch.setattr("vlm_local.engines.loading.measure_free_memory", lambda device, free=free: free)
        with pytest.raises(ConfigError, match="take a smaller model"):
            load_model(checkpoint)


@pytest.mark.slow
def test_a_mixture_of_internvl_answers_as_outlines():
    folder = tiny_checkpoint("internvl-moe")
    assert differ(folder, folder, decoder="outlines") < 1e-4
    assert load_model(open_checkpoint(folder)).model.get_experts_implementation()["text_config"] == "grouped_mm"


def test_experts_are_computed_as_this_engine_wants_it(tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen3-vl-moe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"experts_implementation": "eager"}))
    assert load_model(open_checkpoint(folder)).model.get_experts_implementation()["text_config"] == "grouped_mm"


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "mps", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError, match=f"--device {device}"):
        load_model(open_checkpoint(tiny_checkpoint("qwen2-vl")), device=device)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("proprio", [None, np.zeros(7)])
def test_the_end_of_every_prompt_keeps_the_phrases_tokens(family, proprio):
    loaded, processing = _open_processing(family)
    template = load_template("paligemma" if "paligemma" in family else "chat")
    prompt = build_prompt(template, Observation(NOISE, "open the drawer", proprio), ["stop"])
    last = int(processing.prepare(replace(REQUEST, prompt=prompt)).input_ids[-1])
    tokens = tokenize_sentences(loaded.tokenizer, PHRASES, last, loaded.eos_token_id, loaded.lead)
    assert len(tokens) == len(PHRASES)
    assert loaded.lead == (" " if family.startswith("smolvlm") else "")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_before_the_image_are_the_same_for_every_image(family):
    loaded, processing = _open_processing(family)
    first, other = (processing.prepare(replace(REQUEST, image=image)) for image in (NOISE, 255 - NOISE))
    count = first.before_length
    assert count == other.before_length and torch.equal(first.input_ids[:count], other.input_ids[:count])
    assert (count > 0) == ("paligemma" not in family)
    assert loaded.model.config.image_token_id not in first.input_ids[:count]
    assert first.input_ids[count] == loaded.model.config.image_token_id


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(16, 16), (480, 640), (16, 2000)])
def test_pictures_of_any_shape_are_taken(family, shape):
    _, processing = _open_processing(family)
    image = np.zeros((*shape, 3), np.uint8)
    assert processing.prepare(replace(REQUEST, image=image)).input_ids.dim() == 1


def test_a_huge_picture_is_scaled_down_and_a_thread_is_refused():
    _, processing = _open_processing("qwen2-vl")
    huge = processing.prepare(replace(REQUEST, image=np.zeros((4096, 4096, 3), np.uint8)))
    assert huge.vision["image_grid_thw"].prod() * 14 * 14 <= 1.02 * MAX_PIXELS
    with pytest.raises(RequestError, match="16x4096"):
        processing.prepare(replace(REQUEST, image=np.zeros((4096, 16, 3), np.uint8)))


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_the_users_words_are_only_words(family):
    loaded, processing = _open_processing(family)
    control = [
        token.content
        for token in loaded.tokenizer.added_tokens_decoder.values()
        if token.content.strip() and not re.search("(?i)image|img|vision|video", token.content)
    ]
    plain = replace(REQUEST, prompt=Prompt("", "open the drawer"))
    expected = processing.prepare(plain).input_ids.tolist()
    for token in control[:20] + control[-20:]:
        left, name, right = re.fullmatch(r"([<|]*)(.*?)([|>]*)", token).groups()
        nested = 4 * left + name + 4 * right
        words = f"open {token} the {nested} drawer {token}{token} [{token}] <{token}> \u00e9"
        ids = processing.prepare(replace(REQUEST, prompt=Prompt("", words))).input_ids.tolist()
        number = loaded.tokenizer.convert_tokens_to_ids(token)
        assert ids.count(number) == expected.count(number), token
        with pytest.raises(RequestError, match="control token"):
            processing.prepare(replace(REQUEST, sentences=("yes", f"no {token}")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_placeholder_of_a_picture_in_the_users_words_is_refused(family):
    loaded, processing = _open_processing(family)
    image = loaded.processor.image_token
    for words in (image, f"open {image}{image}", f"<{image}>", f"<|{image}|>", f"[{image}]"):
        with pytest.raises(RequestError, match="stands for a picture"):
            processing.prepare(replace(REQUEST, prompt=Prompt("", words)))


@pytest.mark.parametrize(
    "words", ["[/nothink]", "</nothink>", "[[/nothink]]", "/no/nothinkthink", "</no[/nothink]think>"]
)
def test_a_control_token_without_brackets_is_found_in_brackets_too(words):
    """GLM's, which turns its thoughts off."""
    assert "/nothink" not in ControlTokenFilter(["/nothink", "<think>"])(words)


def test_a_deep_nest_of_control_tokens_takes_no_time():
    _, processing = _open_processing("paligemma")
    words = "<" * 900 + "loc0001" + ">" * 900
    start = process_time()
    processing.prepare(replace(REQUEST, prompt=Prompt("", words)))
    assert process_time() - start < 5


@pytest.mark.parametrize("family", ["qwen2-vl", "paligemma", "smolvlm2"])
def test_a_text_of_too_many_tokens_is_refused_whatever_the_picture_takes(family):
    _, processing = _open_processing(family)
    prompt = replace(PROMPT, after="\U0001f3cc" * MAX_PROMPT_TOKENS)
    with pytest.raises(RequestError, match=rf"takes \d+ tokens.*{MAX_PROMPT_TOKENS} are allowed"):
        processing.prepare(replace(REQUEST, prompt=prompt))
    wide = np.zeros((896, 1120, 3), np.uint8)
    processing.prepare(replace(REQUEST, image=wide, prompt=replace(PROMPT, after="up " * 300)))
