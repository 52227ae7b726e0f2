"""What a stranger's config.json says: computed as transformers computes it, or refused."""

import json
import shutil

import numpy as np
import pytest

from tests.hearing import differ, hear, write_few
from tests.slow import slow
from tests.tiny_models import tiny_checkpoint
from vlm_local.errors import ConfigError


def _edit(folder, text=None, **changes):
    """text: changes of the language model's part. A value of None takes the key out."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | changes
    content["text_config"] |= text or {}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("family", ["qwen2-vl", slow("qwen2.5-vl")])
def test_a_sliding_window_is_kept_to_in_every_family(family, tmp_path):
    folder = shutil.copytree(tiny_checkpoint(family), tmp_path / "model")
    _edit(folder, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None})
    options = {"posterior": "exact", "grammar": write_few(tmp_path)}
    ours, theirs = (hear(folder, decoder=each, **options) for each in ("trie", "outlines"))
    assert (ours[2]["decoder"], theirs[2]["decoder"]) == ("trie", "outlines")
    assert ours[0] == theirs[0]
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)
    assert differ(folder, tiny_checkpoint(family)) > 1e-3


def test_attention_is_one_that_takes_our_masks_whatever_the_folder_was_trained_with(folder):
    _edit(folder, attn_implementation="flash_attention_2")
    assert differ(folder, tiny_checkpoint("qwen2-vl")) == 0


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ({}, {"dtype": None, "torch_dtype": "auto"}, r"config\.json cannot be read by transformers.*'auto'"),
        (
            {
                "rope_parameters": {
                    "rope_type": "dynamic",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "mrope_section": [2, 3, 3],
                },
                "max_position_embeddings": 4096,
            },
            {},
            r"rope_type is 'dynamic'.*write \"default\"",
        ),
        ({}, {"image_token_id": 5}, r"picture's token is \d+, '<\|image_pad\|>', .*config\.json has image_token_id 5"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_the_weights_are_read(text, changes, said, folder):
    _edit(folder, text, **changes)
    with pytest.raises(ConfigError, match=said):
        hear(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    """One of them in an instruction would be a fault at every step of that task alone."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    last = max(content["added_tokens"], key=lambda token: token["id"])
    content["added_tokens"].append({**last, "id": last["id"] + 1, "content": "spoon", "special": False})
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"last word is \d+, 'spoon', but the model has \d+ \(vocab_size"):
        hear(folder)
