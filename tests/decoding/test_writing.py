"""Free text in pieces: the words of a plain greedy decoder, and KV read ahead that a step finds."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.decoding.tiny import PHRASES, draw_request, load_tiny, prepare, share_tiny, shuffle_head
from tests.slow import slow
from tests.tiny_models.names import GEMMA4, KEEP_A_STATE, KEEP_NOTHING, MISTRAL, MIXED, MOLMO2
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.errors import EngineError
from vlm_local.types import Picture, Prompt

FIELDS = (("TASK", 5), ("MOVE REASONING", 4))
CHAT = ["qwen3-vl", "smolvlm2", slow("qwen2-vl"), slow("qwen2.5-vl"), slow("smolvlm"), slow("gemma3"), slow("internvl")]
CHAT += map(slow, (*GEMMA4, "glm4v", *MISTRAL))


def finish(pieces):
    """All pieces -> what comes of them, and their names."""
    names = []
    with torch.inference_mode():
        while True:
            try:
                names.append(next(pieces))
            except StopIteration as end:
                return end.value, names


def build_request(seed: int = 1, text: str = "", num_earlier: int = 1):
    """With an earlier picture, and `text` behind it."""
    generator = np.random.default_rng(99)
    shown = [Picture(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(num_earlier)]
    request = draw_request(seed, episode="r/1", posterior="exact", sentences=PHRASES[::9])
    return replace(request, prompt=Prompt("Rules.", request.prompt.after, (*shown, text) if text else (*shown,)))


def write_plainly(loaded, prepared) -> list[str]:
    """The same by whole forwards of transformers' own model."""
    added = loaded.tokenizer.added_tokens_decoder.items()
    rows = len(loaded.model.lm_head.weight)
    banned = [number for number, token in added if number < rows and token.content.strip()]
    banned.remove(loaded.eos_token_id)
    ids, lines = prepared.input_ids.tolist(), []
    vision = prepared.join_vision()
    for place, (name, limit) in enumerate(FIELDS):
        ids += loaded.tokenizer(("\n" if place else loaded.lead) + f"{name}:", add_special_tokens=False)["input_ids"]
        said = []
        for _ in range(limit):
            inputs = dict(vision)
            for types in {"mm_token_type_ids", "token_type_ids"} & inputs.keys():
                inputs[types] = torch.isin(torch.tensor([ids]), torch.tensor(loaded.processor.image_token_ids)).long()
            logits = loaded.model(input_ids=torch.tensor([ids]), **inputs).logits[0, -1, : len(loaded.tokenizer)]
            logits[banned] = -torch.inf
            token = int(logits.argmax())
            if token == loaded.eos_token_id or "\n" in loaded.tokenizer.decode([token]):
                break
            said.append(token)
            ids.append(token)
        words = "".join(each if each.isprintable() else " " for each in loaded.tokenizer.decode(said))
        lines.append(f"{name}: {' '.join(words.replace(chr(0xFFFD), '').split())}")
    return [line for line in lines if not line.endswith(": ")]


@pytest.mark.parametrize("family", [*CHAT, slow("qwen3.5"), slow("lfm2-vl"), *map(slow, (*MIXED, *MOLMO2))])
def test_what_is_written_is_what_a_plain_decoder_says(family):
    loaded, processing = share_tiny(family)
    decoder = TreeDecoder(loaded)
    [step] = prepare(processing, build_request())
    decoder.decode([step])
    [asked] = prepare(processing, build_request(2))
    thought, names = finish(decoder.writer.write(asked, FIELDS, 100))
    num_seen = 2 if family in (*KEEP_NOTHING, *MOLMO2) else 1  # the earlier picture's KV is the step's
    assert names[0] == "look" and names.count("look") == num_seen
    with torch.inference_mode():
        assert thought.text.splitlines() == write_plainly(loaded, asked)
    assert names.count("write") == thought.num_tokens <= 9


def test_pictures_that_see_one_another_are_read_in_one_piece():
    """Longer together than a piece; with these weights the words are others where they are not."""
    loaded, processing = load_tiny("molmo2")
    shuffle_head(loaded, 6)
    [asked] = prepare(processing, build_request(2, num_earlier=2))
    thought, names = finish(TreeDecoder(loaded).writer.write(asked, FIELDS, 100))
    with torch.inference_mode():
        assert thought.text.splitlines() == write_plainly(loaded, asked)
    assert names.count("read") == 2  # up to the last picture's end, and what is behind


def test_the_tokens_of_all_fields_are_bounded_together():
    loaded, processing = share_tiny("smolvlm2")
    [asked] = prepare(processing, build_request())
    thought, _ = finish(TreeDecoder(loaded).writer.write(asked, (("ONE", 3), ("TWO", 3), ("THREE", 3)), 5))
    assert thought.num_tokens <= 5 and "THREE" not in thought.text


@pytest.mark.parametrize("family", [*CHAT, slow("qwen3.5"), slow("lfm2-vl"), *map(slow, MIXED)])
def test_a_step_finds_what_was_read_ahead_and_answers_as_without(family):
    """Also where a step with the old prompt comes between the reading and the first step with the new one."""
    loaded, processing = share_tiny(family)
    decoder = TreeDecoder(loaded)
    before, after = prepare(processing, *(build_request(3, text) for text in ("TASK: old", "TASK: new, PLAN: go")))
    decoder.decode([before])
    _, names = finish(decoder.writer.read_ahead(after))
    if family not in KEEP_A_STATE:
        assert names == ["read"]  # the picture before it is kept
    [old] = decoder.decode([before])
    [new] = decoder.decode([after])
    assert old.stats["reused_tokens"] == before.before_length and new.stats["reused_tokens"] >= after.before_length - 2
    for prepared, answer in ((before, old), (after, new)):
        [plain] = TreeDecoder(loaded).decode([prepared])
        np.testing.assert_allclose(answer.probabilities, plain.probabilities, atol=1e-5)
    assert finish(decoder.writer.read_ahead(after)) == (None, [])
    decoder.forget("r/1")
    assert decoder.decode([after])[0].stats["reused_tokens"] == 0


@pytest.mark.slow
def test_a_model_that_attends_to_all_of_its_prompt_cannot_write():
    loaded, processing = share_tiny("paligemma")
    [asked] = prepare(processing, draw_request(1))
    with pytest.raises(EngineError, match="whole prompt at once"):
        finish(TreeDecoder(loaded).writer.write(asked, FIELDS, 9))
