"""What the tree decoder refuses is answered by outlines, and said so."""

import logging
from dataclasses import replace

from tests.decoding.tiny import PHRASES, draw_request, prepare, share_tiny
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.engines.hf import MAX_OUTLINES_TOKENS, DefaultDecoder
from vlm_local.errors import RequestError

CUT = ("clos", "close gripper", "stop")  # the tokens of the first do not begin those of the second


def test_a_grammar_without_a_trie_goes_to_outlines_with_the_reason(caplog):
    loaded, processing = share_tiny("qwen2-vl")
    prepared = prepare(
        processing,
        draw_request(0, sentences=CUT, posterior="exact"),
        draw_request(1),
        draw_request(2, sentences=CUT),
    )
    decoder = DefaultDecoder(loaded)
    with caplog.at_level(logging.WARNING):
        answers = decoder.decode(prepared)
    assert [each.sentence for each in answers] == [each.sentence for each in OutlinesDecoder(loaded).decode(prepared)]
    assert answers[1].sentence in PHRASES and "draft_hit" in answers[1].stats
    assert "draft_hit" not in answers[0].stats and abs(answers[0].probabilities.sum() - 1) < 1e-5
    assert decoder.refusals == {"clos": "the tokens of 'clos' do not begin those of 'close gripper'"}
    assert caplog.text.count("outlines decodes 'clos'") == 1


def test_what_is_kept_of_grammars_is_bounded(monkeypatch):
    for module in ("engines.hf", "decoding.outlines", "decoding.tree"):
        monkeypatch.setattr(f"vlm_local.{module}.MAX_GRAMMARS", 2)
    loaded, processing = share_tiny("qwen2-vl")
    decoder = DefaultDecoder(loaded)
    grammars = [(word[:-1], word, "stop") for word in ("close", "drawer", "gripper")]
    requests = [draw_request(0, sentences=sentences) for sentences in grammars]
    for prepared in prepare(processing, *requests):
        decoder.decode([prepared])
    assert list(decoder.refusals) == ["drawe", "grippe"]
    kept = [each._keep_grammar.cache_info().currsize for each in (decoder._outlines, decoder._tree)]
    assert kept == [2, 2]


def test_nothing_is_refused_without_a_reason():
    loaded, processing = share_tiny("qwen2-vl")
    decoder = DefaultDecoder(loaded)
    decoder.decode(prepare(processing, draw_request(0)))
    assert decoder.refusals == {}


def test_what_outlines_would_need_too_long_for_or_cannot_spell_fails_alone():
    loaded, processing = share_tiny("qwen2-vl")
    grammars = [("clos", "close gripper" + " up" * MAX_OUTLINES_TOKENS), ("yes", "no"), CUT]
    requests = [draw_request(number, sentences=sentences) for number, sentences in enumerate(grammars)]
    prepared = prepare(processing, *requests)
    prepared[1] = replace(prepared[1], request=replace(requests[1], sentences=(loaded.tokenizer.eos_token, "stop")))
    long, unspellable, good = DefaultDecoder(loaded).decode(prepared)
    assert isinstance(long, RequestError) and "use shorter ones" in str(long)
    assert isinstance(unspellable, RequestError) and "cannot be spelled" in str(unspellable)
    assert good.sentence in CUT
