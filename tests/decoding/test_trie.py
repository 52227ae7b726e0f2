"""The trie of a tokenizer: what it holds, what it refuses, and that masks are the same at every node."""

import pytest
import torch

from tests.decoding.tiny import PHRASES, draw_request, prepare, share_tiny
from tests.slow import slow
from vlm_local.decoding.outlines import OutlinesDecoder, build_token_grammar
from vlm_local.decoding.trie import build_trie, tokenize_sentences
from vlm_local.errors import GrammarError

END = 99
TOKENIZERS = ("qwen2-vl", "paligemma", "smolvlm2")  # the other families share them


def tokenize_phrases(family, sentences=PHRASES):
    loaded, processing = share_tiny(family)
    [prepared] = prepare(processing, draw_request(0))
    return tokenize_sentences(loaded.tokenizer, sentences, int(prepared.input_ids[-1]), loaded.eos_token_id)


def list_allowed(trie, node):
    return {int(trie.live_tokens[t]) for t in trie.edge_token[trie.edges[node] : trie.edges[node + 1]]}


@pytest.mark.parametrize("family", TOKENIZERS)
def test_every_sentence_is_a_path_that_ends(family):
    tokens, end = tokenize_phrases(family), share_tiny(family)[0].eos_token_id
    trie = build_trie(PHRASES, tokens, end)
    for index, (ids, node) in enumerate(zip(tokens, trie.end_node, strict=True)):
        path = trie.list_path(int(node))
        assert trie.token[path].tolist() == ids and trie.depth[node] == len(ids)
        assert trie.edge_target[trie.end_edge[index]] == -1 - index
        assert trie.live_tokens[trie.edge_token[trie.end_edge[index]]] == end
    children = trie.edge_target[trie.edge_target >= 0]
    assert sorted(children) == list(range(1, len(trie)))  # one way to every node
    assert all(trie.parent[node] < node for node in range(1, len(trie)))
    for node in range(0, len(trie), 97):
        below = [i for i, end_node in enumerate(trie.end_node) if node in (0, *trie.list_path(int(end_node)))]
        assert (trie.first[node], trie.last[node]) == (min(below), max(below))


@pytest.mark.parametrize(
    ("family", "sentences"), [("qwen2-vl", PHRASES[::9]), *(slow(family, PHRASES) for family in TOKENIZERS)]
)
def test_outlines_mask_is_the_trie_at_every_node(family, sentences):
    """llguidance's mask, asked as `generate` asks it, against the trie's edges: all nodes, all tokens."""
    tokens, loaded = tokenize_phrases(family, sentences), share_tiny(family)[0]
    trie = build_trie(sentences, tokens, loaded.eos_token_id)
    leaves = [node for node in trie.end_node if trie.edges[node + 1] - trie.edges[node] == 1]
    said = torch.full((len(leaves), int(trie.depth.max())), loaded.eos_token_id)
    for row, node in enumerate(leaves):
        said[row, : trie.depth[node]] = torch.from_numpy(trie.token[trie.list_path(int(node))])
    [processor] = OutlinesDecoder(loaded).list_processors(build_token_grammar(tokens))
    scores = torch.zeros(len(leaves), loaded.model.config.get_text_config().vocab_size)
    seen = set()
    for length in range(said.shape[1] + 1):
        with torch.compiler.set_stance("force_eager"):  # as the decoder calls it
            allowed = torch.isfinite(processor(said[:, :length], scores.clone()))  # one step of all leaves
        for row, leaf in enumerate(leaves):
            here = int(trie.paths[leaf, length - 1]) if length else 0
            if length <= trie.depth[leaf] and here not in seen:
                assert set(allowed[row].nonzero()[:, 0].tolist()) == list_allowed(trie, here)
                seen.add(here)
    assert len(seen) == len(trie)


def test_what_the_prompt_ends_with_may_not_change_a_sentence():
    loaded, _ = share_tiny("qwen2-vl")
    [space] = loaded.tokenizer(" ", add_special_tokens=False)["input_ids"]
    with pytest.raises(GrammarError, match="has other tokens behind ' '"):
        tokenize_sentences(loaded.tokenizer, PHRASES, space, loaded.eos_token_id)


def test_a_sentence_that_tokens_cannot_spell_is_refused():
    with pytest.raises(GrammarError, match="cannot be spelled"):
        tokenize_phrases("qwen2-vl", ["cafe\u0301"])  # this tokenizer composes accents


def test_tokens_that_are_not_prefix_consistent_are_refused_with_both_sentences():
    with pytest.raises(GrammarError, match="the tokens of 'move up' do not begin those of 'move upper'"):
        build_trie(["move up", "stop", "move upper"], [[1, 2], [4], [1, 3]], END)
    build_trie(["move up", "stop", "move upper"], [[1, 2], [4], [1, 2, 3]], END)


def test_two_sentences_with_the_same_tokens_are_refused():
    with pytest.raises(GrammarError, match="same tokens"):
        build_trie(["a", "b"], [[1], [1]], END)
