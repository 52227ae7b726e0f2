"""The small files of other people's folders: end tokens, chat templates, image processors."""

import json
import logging
import shutil

import pytest

from tests.hearing import differ, hear, write_few
from tests.slow import slow
from tests.tiny_models import edit_json, tiny_checkpoint
from vlm_local.checkpoint import open_checkpoint
from vlm_local.decoding.families import LoadedModel
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.errors import ConfigError
from vlm_local.files import find_shipped
from vlm_local.types import Prompt

CHATML = json.loads((tiny_checkpoint("qwen2-vl") / "chat_template.json").read_text())["chat_template"]
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def _copy(family, tmp_path):
    return shutil.copytree(tiny_checkpoint(family), tmp_path / family)


def _load(folder) -> LoadedModel:
    return load_model(open_checkpoint(folder))


@pytest.mark.parametrize("decoder", ["trie", "outlines"])
def test_a_phrase_ends_with_the_token_that_the_chat_template_writes(decoder, tmp_path):
    """A base model's files, fine-tuned on chat: eos_token is <|endoftext|>, turns end with <|im_end|>."""
    shipped = find_shipped("checkpoints") / "tiny"
    folder = shutil.copytree(shipped, tmp_path / "tiny")
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit_json(folder / "generation_config.json", eos_token_id=[2, 0])
    options = {"decoder": decoder, "decide": "greedy", "grammar": write_few(tmp_path)}
    told, expected = (hear(each, **options) for each in (folder, shipped))
    assert told[0] == expected[0] and (told[1] == expected[1]).all()


def test_weights_for_sounds_are_left_without_a_table_of_their_names(tmp_path, caplog):
    folder, logger = _copy("gemma4", tmp_path), logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)  # transformers' own loggers hand nothing on
    try:
        _load(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "audio_tower" not in caplog.text


def test_a_generation_config_that_is_behind_is_outvoted_and_one_that_is_missing_is_not_needed(folder):
    expected = _load(folder).eos_token_id
    edit_json(folder / "generation_config.json", eos_token_id=[3, 4])
    assert _load(folder).eos_token_id == expected
    (folder / "generation_config.json").unlink()
    assert _load(folder).eos_token_id == expected


def test_an_end_that_no_other_file_knows_is_refused_with_all_of_them(folder):
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    edit_json(folder / "generation_config.json", eos_token_id=[3, 4])
    said = r"itself: .*'<\|endoftext\|>'.*generation_config\.json with \[3, 4\], .*template with '<\|im_end\|>'"
    with pytest.raises(ConfigError, match=said):
        _load(folder)


@pytest.mark.parametrize("has_file", [True, False])
def test_without_a_template_tokenizer_and_configuration_must_agree(has_file, tmp_path):
    """And the file that is blamed is one that is there."""
    folder = _copy("paligemma", tmp_path)
    edit_json(folder / "tokenizer_config.json", eos_token="<pad>")
    if not has_file:
        (folder / "generation_config.json").unlink()
    with pytest.raises(ConfigError, match="generation_config.json with" if has_file else r", config\.json with"):
        _load(folder)


def _write_template(folder, template):
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(template)


def test_a_block_for_thoughts_is_closed(folder):
    _write_template(folder, THINKING)
    loaded = _load(folder)
    processing = Processing(loaded.processor, "qwen2-vl", loaded.dtype)
    text = processing.render(Prompt("Answer.", "open <think>"))
    assert text.endswith("open <think><|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert loaded.lead == ""


def test_a_template_is_told_to_leave_thoughts_out(folder):
    switch = "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\nLet me see{% endif %}"
    _write_template(folder, THINKING.replace("<think>\n", switch))
    loaded = _load(folder)
    text = Processing(loaded.processor, "qwen2-vl", loaded.dtype).render(Prompt("", "go"))
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")


def test_what_a_template_writes_before_an_answer_stays(folder):
    """As RoboBrain 2.0 begins an answer without thoughts."""
    _write_template(folder, THINKING.replace("<think>\n", "<think></think><answer>"))
    loaded = _load(folder)
    text = Processing(loaded.processor, "qwen2-vl", loaded.dtype).render(Prompt("", "go"))
    assert text.endswith("<|im_start|>assistant\n<think></think><answer>")
    assert loaded.lead == "" and loaded.tokenizer.decode(loaded.eos_token_id) == "<|im_end|>"


def test_where_nothing_stands_behind_an_answer_the_next_question_ends_it(tmp_path):
    """As with GLM, whose tokenizer has an end of its own, too."""
    folder = _copy("glm4v", tmp_path)
    loaded = _load(folder)
    text = Processing(loaded.processor, "glm4v", loaded.dtype).render(Prompt("", "go"))
    assert text.endswith("go/nothink<|assistant|>\n<think></think>\n")
    assert loaded.lead == "" and loaded.tokenizer.decode(loaded.eos_token_id) == "<|user|>"
    edit_json(folder / "generation_config.json", eos_token_id=loaded.tokenizer.convert_tokens_to_ids(["<|endoftext|>"]))
    assert loaded.tokenizer.decode(_load(folder).eos_token_id) == "<|endoftext|>"


def test_a_template_may_take_the_words_of_an_answer_alone(tmp_path):
    """As GLM-4.1V's, which has no answer without thoughts, either."""
    folder = _copy("glm4v", tmp_path)
    turns = json.loads((folder / "chat_template.json").read_text())["chat_template"].replace("<think></think>\n", "")
    words = "{% if message['role'] == 'assistant' %}{{ message['content'] }}{% else %}{% for part"
    _write_template(folder, turns.replace("{% for part", words).replace("{% endfor %}", "{% endfor %}{% endif %}", 1))
    loaded = _load(folder)
    assert loaded.lead == "" and loaded.tokenizer.decode(loaded.eos_token_id) == "<|user|>"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (THINKING.replace("<think>\n", "<think>\nLet me see"), "opens a <think> block for thoughts"),
        (CHATML.replace("<|im_end|>", " ."), "behind an answer, the chat template writes ' ."),
        (CHATML.replace("{{ part['text'] }}", "x"), "does not write an assistant's words"),
        ("{% for", "cannot write a question and an answer"),
        ("{{ raise_exception('no') }}", "cannot write a question and an answer"),
        ("{{ 1 / 0 }}", "cannot write a question and an answer"),
        ("{{ messages + 1 }}", "cannot write a question and an answer"),
    ],
)
def test_a_template_that_cannot_frame_an_answer_is_refused(folder, template, reason):
    _write_template(folder, template)
    with pytest.raises(ConfigError, match=reason):
        _load(folder)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "additional_chat_templates"])
def test_of_templates_with_names_the_default_one_is_taken(place, folder):
    (folder / "chat_template.json").unlink()
    if place == "tokenizer_config.json":
        named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ 1 / 0 }}"}]
        edit_json(folder / place, chat_template=named)
    else:
        _write_template(folder, CHATML)
        (folder / place).mkdir()
        (folder / place / "tool_use.jinja").write_text("{{ 1 / 0 }}")
    assert differ(folder, tiny_checkpoint("qwen2-vl")) == 0


def test_templates_without_a_default_are_refused_by_their_names(folder):
    (folder / "chat_template.json").unlink()
    named = [{"name": name, "template": CHATML} for name in ("rag", "tool_use")]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    with pytest.raises(ConfigError, match="chat templates rag, tool_use; expected one that is called default"):
        _load(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        slow("qwen2.5-vl", "Qwen2_5_VLImageProcessor"),
        ("qwen3-vl", None),
        ("paligemma", "CLIPImageProcessor"),
        ("smolvlm2", "Idefics3ImageProcessorFast"),
    ],
)
def test_a_familys_image_processor_is_its_own_whatever_the_file_calls_it(family, name, tmp_path):
    folder = _copy(family, tmp_path)
    edit_json(folder / "preprocessor_config.json", image_processor_type=name, processor_class="GoneProcessor")
    assert differ(folder, tiny_checkpoint(family)) == 0


@pytest.mark.parametrize(
    ("family", "key"),
    [
        ("qwen3-vl", "image_mean"),
        ("qwen3-vl", "patch_size"),
        ("paligemma", "size"),
        ("smolvlm2", "max_image_size"),
        slow("gemma3", "size"),
        slow("internvl", "image_std"),
        slow("molmo2", "pooling_size"),
    ],
)
def test_what_an_image_processor_cannot_guess_is_asked_for(family, key, tmp_path):
    folder = _copy(family, tmp_path)
    edit_json(folder / "preprocessor_config.json", **{key: None})
    with pytest.raises(ConfigError, match=rf"preprocessor_config\.json .*lacks {key}, which cannot be guessed"):
        _load(folder)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("max_soft_tokens", None, r"lacks max_soft_tokens, which cannot be guessed"),
        slow("pooling_kernel_size", 2, r"pooling_kernel_size is 2 .* has pooling_kernel_size 3"),
    ],
)
def test_what_gemma4s_processor_says_of_pictures_is_held_against_the_model(key, value, told, tmp_path):
    folder = _copy("gemma4", tmp_path)
    file = folder / "processor_config.json"
    edit_json(file, image_processor=json.loads(file.read_text())["image_processor"] | {key: value})
    with pytest.raises(ConfigError, match=told):
        _load(folder)


def test_patches_that_the_model_does_not_read_are_refused(folder):
    edit_json(folder / "preprocessor_config.json", patch_size=16)
    with pytest.raises(ConfigError, match=r"patch_size is 16 .* config\.json has patch_size 14"):
        _load(folder)


def test_pictures_of_another_size_than_the_model_reads_are_refused(tmp_path):
    folder = _copy("paligemma", tmp_path)
    edit_json(folder / "preprocessor_config.json", size={"height": 28, "width": 28})
    with pytest.raises(ConfigError, match=r"size is 28 .* has image_size 56"):
        _load(folder)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("encoder_patch_size", 16, r"encoder_patch_size is 16 .* config\.json has patch_size 8"),
        slow("downsample_factor", 4, r"downsample_factor is 4 .* but config\.json has downsample_factor 2"),
    ],
)
def test_what_lfm2s_processor_says_of_pictures_is_held_against_the_model(key, value, told, tmp_path):
    folder = _copy("lfm2-vl", tmp_path)
    edit_json(folder / "preprocessor_config.json", **{key: value})
    with pytest.raises(ConfigError, match=told):
        _load(folder)


@pytest.mark.parametrize(
    ("family", "file", "name", "number"),
    [
        ("paligemma", "preprocessor_config.json", "image_seq_length", 64),
        ("smolvlm2", "processor_config.json", "image_seq_len", None),
        slow("internvl", "processor_config.json", "image_seq_length", 9),
        slow("gemma3", "processor_config.json", "image_seq_length", 9),
    ],
)
def test_a_picture_of_another_number_of_tokens_is_refused(family, file, name, number, tmp_path):
    folder = _copy(family, tmp_path)
    edit_json(folder / file, **{name: number})
    with pytest.raises(ConfigError, match=rf"{name} is \d+ .*the model makes 16 tokens of a picture; write 16"):
        _load(folder)


def test_an_image_processor_of_wrong_kinds_is_refused(tmp_path):
    folder = _copy("smolvlm2", tmp_path)
    edit_json(folder / "preprocessor_config.json", max_image_size={"height": 64, "width": 64})
    with pytest.raises(ConfigError, match="no usable tokenizer and image processor"):
        _load(folder)
