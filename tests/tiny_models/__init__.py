"""Small random checkpoints of every family: real architecture, real files, self-made tokenizer.

`tiny_checkpoint("qwen2-vl")` writes one into a temporary folder, once a process, in about a second.
"""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers

from tests.tiny_models.architectures import BUILDERS
from tests.tiny_models.files import list_processor_files
from tests.tiny_models.tokenizers import build_tokenizer


@functools.cache
def tiny_checkpoint(family: str, seed: int = 0) -> Path:
    """Folder of a random checkpoint; the same folder for the same arguments, gone at exit."""
    return write_checkpoint(family, _scratch() / f"{family}-{seed}", seed)


@functools.cache
def _scratch() -> Path:
    folder = tempfile.mkdtemp(prefix="vlm-local-tiny-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_checkpoint(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a random checkpoint of `family` (one of FAMILIES or GEMMA4) in Hugging Face layout."""
    folder.mkdir(parents=True, exist_ok=True)
    build, family = BUILDERS[family], family.removesuffix("-moe")
    tokenizer, special = build_tokenizer(family)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in list_processor_files(family).items():
        (folder / name).write_text(json.dumps(content, indent=1))
    ids = {name: tokenizer.token_to_id(token) for name, token in special.items()}
    torch.manual_seed(seed)
    model = build(tokenizer.get_vocab_size(), ids)
    ends = [ids["document_end"], ids["eos"]] if "document_end" in ids else ids["eos"]
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, pad_token_id=ids["pad"], bos_token_id=ids.get("bos")
    )
    model.save_pretrained(folder)
    return folder


def edit_json(file: Path, **changes) -> None:
    """Change entries of a folder's file. A value of None takes the key out."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
