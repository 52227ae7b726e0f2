"""A folder in the published layout of SmolVLM-256M-Instruct: pretrained words, and a vision tower at random.

SmolLM2-135M-Instruct, which PyPI has as a GGUF file, is the language model that SmolVLM-256M was trained from: the same
layers, and all but 128 rows of its vocabulary. Nobody trained the eyes, so its answers say nothing of a picture.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

_WORDS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_WORDS |= {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"} | {"attn_output": "self_attn.o_proj"}
_WORDS |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
_TOP = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}
_ROWS, _HEADS, _KV_HEADS = 49_280, 9, 3
_END, _IMAGE = "<end_of_utterance>", "<image>"
# SmolVLM's own, and the one that the words were trained with, with a place for pictures.
TEMPLATES = {
    "smolvlm": (
        "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
        "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for line in message['content'] %}"
        "{% if line['type'] == 'text' %}{{ line['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}


def build(
    gguf: Path, folder: Path, dtype: torch.dtype = torch.float32, template: str = "chatml", vision_layers: int = 12
) -> Path:
    """Write the folder. template: of TEMPLATES. vision_layers: fewer than the published 12 are as blind, and faster."""
    folder.mkdir(parents=True)
    reader = GGUFReader(gguf)
    tokenizer = _build_tokenizer(reader)
    tokenizer.save(str(folder / "tokenizer.json"))
    end = {"smolvlm": _END, "chatml": "<|im_end|>"}[template]
    for name, content in _list_files(end, TEMPLATES[template]).items():
        (folder / name).write_text(json.dumps(content, indent=1))
    model = _build_model(reader, tokenizer, vision_layers)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=1, eos_token_id=tokenizer.token_to_id(end), pad_token_id=2
    )
    model.to(dtype).save_pretrained(folder)
    return folder


def _build_tokenizer(reader: GGUFReader) -> Tokenizer:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    added = ["<global-img>", *rows, "<fake_token_around_image>", _IMAGE]
    reserved = [f"<|reserved_special_token_{index}|>" for index in range(_ROWS - len(tokens) - len(added) - 1)]
    special = [*control, *added, *reserved, _END]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _list_files(end: str, template: str) -> dict[str, dict]:
    words = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": end}
    words |= {
        "model_max_length": 8192,
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": template,
    }
    image = {"image_processor_type": "Idefics3ImageProcessor", "processor_class": "Idefics3Processor"}
    image |= {"do_image_splitting": True, "do_pad": True, "do_resize": True, "do_convert_rgb": True, "resample": 1}
    image |= {"do_normalize": True, "do_rescale": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image |= {"max_image_size": {"longest_edge": 512}, "size": {"longest_edge": 2048}}
    return {
        "tokenizer_config.json": words,
        "preprocessor_config.json": image,
        "processor_config.json": {"image_seq_len": 64, "processor_class": "Idefics3Processor"},
        "chat_template.json": {"chat_template": template},
    }


def _build_model(reader: GGUFReader, tokenizer: Tokenizer, vision_layers: int) -> torch.nn.Module:
    text = {"model_type": "llama", "vocab_size": _ROWS, "hidden_size": 576, "intermediate_size": 1536}
    text |= {"num_hidden_layers": 30, "num_attention_heads": _HEADS, "num_key_value_heads": _KV_HEADS}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "rms_norm_eps": 1e-5}
    text |= {"max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": vision_layers}
    vision |= {"num_attention_heads": 12, "image_size": 512, "patch_size": 16}
    config = transformers.Idefics3Config(
        text_config=text | {"tie_word_embeddings": False},
        vision_config=vision,
        scale_factor=4,
        image_token_id=tokenizer.token_to_id(_IMAGE),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.Idefics3ForConditionalGeneration(config).eval()
    words = _read_words(reader)
    rows = words["embed_tokens.weight"]
    # Rows that SmolLM2 lacks: the mean of all, and the end that it knows for the new one.
    added = rows.mean(dim=0).repeat(_ROWS - len(rows), 1)
    added[-1] = rows[2]
    words["embed_tokens.weight"] = torch.cat([rows, added])
    model.model.text_model.load_state_dict(words)
    head = words["embed_tokens.weight"].clone()
    model.lm_head.load_state_dict({"weight": head})
    _scale_pictures(model, float(rows.norm(dim=1).mean()))
    return model


def _read_words(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """The language model's weights by the names of transformers."""
    weights = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        name = _TOP.get(tensor.name)
        if name is None:
            _, layer, word, kind = tensor.name.split(".")
            name = f"layers.{layer}.{_WORDS[word]}.{kind}"
            heads = {"attn_q": _HEADS, "attn_k": _KV_HEADS}.get(word)
            if heads:  # llama.cpp turns neighbouring numbers of a head, transformers the two halves
                value = value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        weights[name] = value
    return weights


@torch.no_grad()
def _scale_pictures(model: torch.nn.Module, norm: float) -> None:
    """Make a picture's tokens as long as a word's, and different from place to place and picture to picture."""
    for module in model.model.vision_model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    pixels = torch.rand(2, 1, 3, 512, 512) * 2 - 1
    features = torch.cat([*model.get_image_features(pixels).pooler_output])
    weight = model.model.connector.modality_projection.proj.weight
    weight.mul_(norm / float(features.norm(dim=-1).mean()))
