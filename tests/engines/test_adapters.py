"""LoRA adapters: what was trained is what is served, as peft itself computes it, or the adapter is refused."""

import copy
import functools
import json
import math
import shutil

import pytest
import safetensors.torch
import torch
import transformers

from tests.hearing import differ, hear
from tests.slow import slow
from tests.tiny_models import edit_json, tiny_checkpoint
from vlm_local.checkpoint import open_checkpoint
from vlm_local.engines.loading import load_model
from vlm_local.errors import ConfigError


@functools.cache
def _read(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder)


def _load(folder):
    return copy.deepcopy(_read(folder))


def _adapt(family, folder, **options):
    """A trained adapter's folder beside its tiny base."""
    import peft  # here and below: three seconds, which not every process that collects this file needs

    torch.manual_seed(0)
    base = tiny_checkpoint(family)
    model = peft.get_peft_model(_load(base), peft.LoraConfig(r=4, **{"target_modules": ["q_proj"]} | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or "modules_to_save" in name or parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def _merge(family, adapter, folder):
    """The trained model as a whole folder, merged by peft; head and embedding are two tensors, as in training."""
    import peft

    base = tiny_checkpoint(family)
    model = _load(base)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return _adapt("qwen2-vl", tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def adapter(trained, tmp_path):
    """Of qwen2-vl's first projection, to be changed."""
    return shutil.copytree(trained, tmp_path / "adapter")


def _rename(adapter, old, new):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name.replace(old, new): each for name, each in tensors.items()}, file)
    return adapter


_KINDS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "convolution and biases": {"target_modules": ["patch_embed.proj", "qkv"], "bias": "lora_only"},
    "dora": {"target_modules": ["o_proj", "qkv"], "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"up_proj": 2},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "up_proj": 3},
    },
}


@pytest.mark.parametrize("kind", [slow(kind) if kind in ("embedding", "whole head") else kind for kind in _KINDS])
def test_every_kind_of_adapter_is_what_peft_makes_of_it(kind, tmp_path):
    adapter = _adapt("qwen2-vl", tmp_path / "adapter", lora_alpha=6, **_KINDS[kind])
    assert differ(adapter, _merge("qwen2-vl", adapter, tmp_path / "whole")) < 1e-4
    assert differ(adapter, tiny_checkpoint("qwen2-vl")) > 1e-3


@pytest.mark.parametrize("family", ["paligemma2", slow("smolvlm2"), slow("lfm2-vl"), slow("qwen3.5-moe")])
def test_adapters_of_other_families_on_a_tied_head(family, tmp_path):
    adapter = _adapt(family, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    assert differ(adapter, _merge(family, adapter, tmp_path / "whole")) < 1e-4
    assert differ(adapter, tiny_checkpoint(family)) > 1e-3


@pytest.mark.parametrize(
    ("family", "new", "old"),
    [
        ("qwen2-vl", "model.model.language_model.", "model.model."),
        slow("qwen2.5-vl", "model.model.visual.", "model.visual."),
        slow("paligemma", "model.model.language_model.", "model.language_model.model."),
        ("paligemma", "lora_A.weight", "lora_A.default.weight"),
    ],
)
def test_module_names_of_older_versions_find_their_place(family, new, old, tmp_path):
    targets = ["qkv"] if "visual" in new else ["q_proj"]
    adapter = _adapt(family, tmp_path / "new", target_modules=targets)
    renamed = _rename(shutil.copytree(adapter, tmp_path / "old"), new, old)
    assert differ(renamed, adapter) == 0
    assert differ(adapter, tiny_checkpoint(family)) > 1e-3


def test_an_adapter_on_a_quantised_base_is_added_beside_its_layers(tmp_path):
    """Merged into 4-bit weights, most of it would be rounded away."""
    import peft

    adapter = _adapt("qwen2-vl", tmp_path / "adapter", target_modules=["q_proj", "up_proj", "lm_head"])
    base = tiny_checkpoint("qwen2-vl")
    quantised = load_model(open_checkpoint(base), "4bit").model
    quantised.lm_head.weight = torch.nn.Parameter(quantised.lm_head.weight.clone())
    trained = peft.PeftModel.from_pretrained(quantised, adapter)
    served = load_model(open_checkpoint(base, "mine", adapter), "4bit").model
    inputs = {"input_ids": torch.arange(20)[None]}
    with torch.no_grad():
        assert torch.allclose(trained(**inputs).logits, served(**inputs).logits, atol=1e-3)
    assert hear(adapter, quantize="4bit")[2]["quantize"] == "4bit"


@pytest.mark.parametrize("names", [["tokenizer"], slow(["preprocessor"]), ["tokenizer", "preprocessor"]])
def test_an_adapter_is_asked_with_the_tokenizer_and_the_pictures_that_it_was_trained_with(names, adapter, tmp_path):
    """Trainers write them beside the adapter: another template, smaller pictures."""
    whole = _merge("qwen2-vl", adapter, tmp_path / "whole")
    before = hear(adapter)[1]
    if "tokenizer" in names:
        template = json.loads((whole / "chat_template.json").read_text())["chat_template"]
        (whole / "chat_template.json").unlink()
        (whole / "chat_template.jinja").write_text(template.replace("<|im_start|>", "<|im_start|>robot: "))
    if "preprocessor" in names:
        edit_json(whole / "preprocessor_config.json", min_pixels=784, max_pixels=1568)
    for file in [each for name in (*names, "chat_template.jinja") for each in whole.glob(f"{name}*")]:
        shutil.copy(file, adapter)
    assert differ(adapter, whole) < 1e-4
    assert abs(hear(adapter)[1] - before).max() > 1e-3


def test_an_adapters_own_tokenizer_must_fit_its_base(adapter):
    """As where tokens were added, and the embedding grew in training only."""
    content = json.loads((tiny_checkpoint("qwen2-vl") / "tokenizer.json").read_text())
    last = max(content["added_tokens"], key=lambda token: token["id"])
    content["added_tokens"].append({**last, "id": last["id"] + 1, "content": "spoon", "special": False})
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"adapter: the tokenizer's last word is \d+, 'spoon'"):
        hear(adapter)


@pytest.mark.parametrize("bits", ["8bit", slow("4bit")])
def test_a_whole_layer_does_not_replace_a_quantised_one(bits, tmp_path):
    """As whole numbers, its weights would all be zero."""
    adapter = _adapt("qwen2-vl", tmp_path / "adapter", modules_to_save=["merger"])
    with pytest.raises(ConfigError, match=r"merger.* is to replace weights that are quantised.*leave --quantize out"):
        hear(adapter, quantize=bits)


def _add(adapter, name, tensor):
    file = adapter / "adapter_model.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(file) | {name: tensor}, file)


_LAYER = "base_model.model.model.language_model.layers.0.self_attn"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda a: _add(a, f"{_LAYER}.x_proj.lora_A.weight", torch.ones(4, 64)), r"x_proj\.lora_A.* has no place"),
        (lambda a: _add(a, f"{_LAYER}.v_proj.weight", torch.ones(4, 64)), r"v_proj\.weight \(4, 64\) has no place"),
        (lambda a: _add(a, f"{_LAYER}.v_proj.lora_A.weight", torch.ones(4, 64)), "of the kinds A cannot change"),
        (lambda a: _add(a, f"{_LAYER}.lora_A.weight", torch.ones(4, 64)), "is a Qwen2VLAttention in the base model"),
        (lambda a: _add(a, f"{_LAYER}.q_proj.lora_A.default.weight", torch.ones(4, 64)), "in the place of another"),
        (lambda a: _add(a, f"{_LAYER}.q_proj.lora_A.weight", torch.ones(4, 32)), "does not fit its base"),
        (lambda a: _add(a, f"{_LAYER}.q_proj.lora_A.weight", torch.ones(3, 64)), "does not fit its base"),
        (lambda a: _add(a, f"{_LAYER}.q_proj.lora_A.weight", torch.ones(64)), "does not fit its base"),
        (lambda a: edit_json(a / "adapter_config.json", lora_alpha=10**400), "expected numbers for lora_alpha"),
        (lambda a: _add(a, f"{_LAYER}.q_proj.lora_A.weight", torch.full((4, 64), math.nan)), "not finite.*--dtype"),
        (lambda a: edit_json(a / "adapter_config.json", peft_type="IA3"), "expected peft_type 'LORA'"),
        (lambda a: edit_json(a / "adapter_config.json", layer_replication=[[0, 2]]), "layer_replication.*plain LoRA"),
        (
            lambda a: edit_json(a / "adapter_config.json", target_parameters=["mlp.experts.down_proj"]),
            "target_parameters.*merge",
        ),
        (lambda a: edit_json(a / "adapter_config.json", init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (lambda a: edit_json(a / "adapter_config.json", lora_alpha="16"), "expected numbers for lora_alpha"),
        (
            lambda a: edit_json(a / "adapter_config.json", alpha_pattern={"(a+)+$": 2}),
            "expected numbers for lora_alpha",
        ),
        (lambda a: edit_json(a / "adapter_config.json", alpha_pattern=[2]), "expected numbers for lora_alpha"),
        (lambda a: edit_json(a / "adapter_config.json", use_dora=True), "cannot change"),
    ],
)
def test_an_adapter_that_is_not_understood_is_refused(spoil, reason, adapter):
    spoil(adapter)
    with pytest.raises(ConfigError, match=reason):
        hear(adapter)


def test_a_module_that_an_adapter_names_is_not_imported(adapter, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('the module of an adapter was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    expected = hear(adapter)[0]
    edit_json(adapter / "adapter_config.json", megatron_config={"a": 1}, megatron_core="planted")
    assert hear(adapter)[0] == expected


def test_pickled_adapters_are_refused(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin, which can run code"):
        hear(adapter)
