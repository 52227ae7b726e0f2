"""Strategies, prior and distribution against brute force, on random tries with random distributions."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vlm_local.decoding.distribution import (
    Prior,
    TrieDistribution,
    certify,
    decide_greedy,
    decide_map,
    decide_sample,
    select_nodes,
)
from vlm_local.decoding.trie import build_trie

END = 99


def build_random_trie(generator):
    """Up to 40 sentences of 1 to 6 tokens out of 4, in an order that is not the trie's."""
    words = [tuple(generator.integers(0, 4, generator.integers(1, 7)).tolist()) for _ in range(40)]
    words = list(dict.fromkeys(words))
    return build_trie(["".join(map(str, word)) for word in words], words, END)


class World:
    """A trie with fixed random logits behind every node, scored sentence by sentence."""

    def __init__(self, seed, scale=2.0):
        generator = np.random.default_rng(seed)
        self.trie = build_random_trie(generator)
        self.logits = scale * generator.normal(size=(len(self.trie), len(self.trie.live_tokens)))

    def score(self, temperature=1.0):
        """(S,) probabilities, by walking every sentence on its own."""
        trie, scores = self.trie, []
        for node, end_edge in zip(trie.end_node, trie.end_edge, strict=True):
            path = [int(trie.in_edge[n]) for n in trie.list_path(int(node))] + [int(end_edge)]
            scores.append(sum(self._log_softmax(edge, temperature) for edge in path))
        return np.exp(scores)

    def _log_softmax(self, edge, temperature):
        node = self.trie.edge_node[edge]
        allowed = self.trie.edge_token[self.trie.edges[node] : self.trie.edges[node + 1]]
        values = self.logits[node] / temperature
        return values[self.trie.edge_token[edge]] - np.log(np.exp(values[allowed]).sum())

    def play(self, judge, limit, drafts=()):
        """Read nodes as asked until `judge` has decided; the choice and how many nodes were read."""
        distribution, weights, read = TrieDistribution(self.trie), Prior(self.trie).weigh(drafts), 0
        choice = judge(distribution)
        while choice.sentence is None:
            nodes = select_nodes(self.trie, weights, choice.focus, limit)
            assert len(nodes) and not distribution.read[nodes[self.trie.branching[nodes]]].any()
            distribution.learn(nodes, self.logits[nodes])
            read += len(nodes)
            choice = judge(distribution)
        return choice, read


worlds = given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 16, 1000]))


@worlds
@settings(max_examples=60, deadline=None)
def test_greedy_follows_the_best_token_everywhere(seed, limit):
    world = World(seed)
    trie, node = world.trie, 0
    while node >= 0:
        edges = np.arange(trie.edges[node], trie.edges[node + 1])
        node = trie.edge_target[edges[world.logits[node][trie.edge_token[edges]].argmax()]]
    assert world.play(decide_greedy, limit)[0].sentence == -1 - node


@worlds
@settings(max_examples=60, deadline=None)
def test_map_finds_the_most_probable_sentence_and_its_lead(seed, limit):
    world = World(seed)
    scores = np.sort(world.score())
    choice, _ = world.play(decide_map, limit)
    assert choice.sentence == world.score().argmax()
    lead = np.log(scores[-1] / scores[-2]) if len(scores) > 1 else np.inf
    assert choice.margin <= lead + 1e-9
    certain, _ = world.play(lambda distribution: decide_map(distribution, slack=lead + 1), limit)
    assert certain.sentence == choice.sentence and certain.margin == pytest.approx(lead)


@worlds
@example(seed=1011, limit=1)  # whose last sentence has such a share
@settings(max_examples=20, deadline=None)
def test_sample_is_the_inverse_cdf_in_the_order_of_the_sentences(seed, limit):
    world = World(seed)
    cumulative = {temperature: world.score(temperature).cumsum() for temperature in (0.5, 1.0, 2.0)}
    for (temperature, cdf), uniform in itertools.product(cumulative.items(), (0.0, 0.1, 0.37, 0.5, 0.9, 1 - 2**-53)):
        rounded = [uniform - 1e-12, uniform + 1e-12]  # a share below a double's last place may be drawn or not
        first, last = np.searchsorted(cdf / cdf[-1], rounded, side="right").clip(max=len(cdf) - 1)
        choice, _ = world.play(lambda distribution, u=uniform, t=temperature: decide_sample(distribution, u, t), limit)
        assert first <= choice.sentence <= last


@worlds
@settings(max_examples=40, deadline=None)
def test_what_a_partial_belief_says_is_never_too_much_and_ends_exact(seed, limit):
    world = World(seed)
    distribution, weights, truth = TrieDistribution(world.trie), Prior(world.trie).weigh(()), world.score()
    for posterior in ("fast", "exact"):
        while (focus := certify(distribution, posterior)) is not None:
            assert 1 - focus.sum() == pytest.approx(known(distribution).sum())
            nodes = select_nodes(world.trie, weights, focus, limit)
            distribution.learn(nodes, world.logits[nodes])
            assert (known(distribution) <= truth + 1e-12).all()
        assert 1 - known(distribution).sum() <= (0.01 if posterior == "fast" else 1e-9)
    np.testing.assert_allclose(known(distribution), truth, atol=1e-12)


def known(distribution):
    return distribution.spread()[1]


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_selection_is_closed_upwards_and_grows_with_its_limit(seed, limit):
    world = World(seed)
    trie = world.trie
    focus = np.zeros(len(trie))
    focus[0] = 1.0
    weights = Prior(trie).weigh(trie.sentences[:3])
    nodes = select_nodes(trie, weights, focus, limit)
    assert (np.diff(nodes) > 0).all() and nodes[0] == 0 and len(nodes) <= limit
    assert np.isin(trie.parent[nodes], nodes).all()
    assert np.isin(nodes, select_nodes(trie, weights, focus, limit + 1)).all()


def test_what_was_said_last_is_read_first():
    world = World(5)
    for sentence in range(0, len(world.trie.sentences), 5):
        world.logits[:] = 0.0
        for edge in [world.trie.in_edge[n] for n in world.trie.list_path(int(world.trie.end_node[sentence]))]:
            world.logits[world.trie.edge_node[edge], world.trie.edge_token[edge]] = 9.0
        world.logits[world.trie.end_node[sentence], world.trie.edge_token[world.trie.end_edge[sentence]]] = 9.0
        _, read = world.play(decide_greedy, limit=16, drafts=(world.trie.sentences[sentence], "never heard of"))
        assert read <= 16


def test_a_trie_of_one_sentence_needs_no_model():
    trie = build_trie(["only"], [[3, 4, 5]], END)
    distribution = TrieDistribution(trie)
    assert decide_greedy(distribution).sentence == decide_map(distribution).sentence == 0
    assert decide_sample(distribution, 0.99, 1.0).sentence == 0
    assert certify(distribution, "exact") is None
