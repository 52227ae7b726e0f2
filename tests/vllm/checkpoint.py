"""A random Qwen2-VL of the shape that vLLM's CPU kernels serve: attention heads 64 wide."""

import json
import re
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from tests.tiny_models import write_checkpoint
from vlm_local.primitives import list_phrases

_WIDTH = 128
_CONSTANT = 1.0  # value of the residual stream's first channel, which nothing may change
_GAP = 30.0


def write_served_checkpoint(folder: Path, seed: int = 0) -> Path:
    """The test checkpoint's tokenizer and processor files around a wider random model, float32.

    vLLM's constraints are on text: any spelling of a phrase in tokens is allowed, and a random model
    likes odd ones. Our own decoder says canonical tokens only, as a trained model does by itself. So
    here every word of a phrase is a token, and the model prefers these; which of them is left to
    chance.
    """
    write_checkpoint("qwen2-vl", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(sorted({word for phrase in list_phrases() for word in re.findall(r" ?\w+|,", phrase)}))
    tokenizer.save(str(folder / "tokenizer.json"))
    model = transformers.Qwen2VLForConditionalGeneration(_describe(folder, tokenizer.get_vocab_size(), seed))
    _prefer(model, {token for phrase in list_phrases() for token in tokenizer.encode(phrase).ids})
    model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return folder


def _describe(folder: Path, vocab_size: int, seed: int) -> transformers.Qwen2VLConfig:
    settings = json.loads((folder / "config.json").read_text())
    text = settings["text_config"]
    text |= {"hidden_size": _WIDTH, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"vocab_size": vocab_size, "max_position_embeddings": 4096}
    text["rope_parameters"]["mrope_section"] = [8, 12, 12]
    settings["vision_config"]["hidden_size"] = _WIDTH
    settings["tie_word_embeddings"] = False
    torch.manual_seed(seed)
    return transformers.Qwen2VLConfig.from_dict(settings)


@torch.no_grad()
def _prefer(model, tokens: set[int]) -> None:
    """Raise the logits of `tokens` and of the end by _GAP, through one channel that is kept constant."""
    text = model.model.language_model
    text.embed_tokens.weight[:, 0] = _CONSTANT
    for layer in text.layers:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    merged = model.model.visual.merger.mlp[-1]
    merged.weight[0] = 0
    merged.bias[0] = _CONSTANT
    model.lm_head.weight[:, 0] = -_GAP
    model.lm_head.weight[[*tokens, model.config.text_config.eos_token_id], 0] = _GAP
