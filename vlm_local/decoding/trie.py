"""The token trie of a list of sentences: which tokens may follow which, as flat numpy arrays.

A node is what has been said so far, node 0 nothing yet. An edge is one allowed next token: it leads
to a child, or, with the end token, to a complete sentence. Knows no model and no probability.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm_local.errors import GrammarError

MAX_GRAMMARS = 64  # lists of sentences kept ready: anyone who asks typed questions brings new ones


@dataclass(frozen=True, eq=False)
class TokenTrie:
    """N nodes in level order (a parent's id is below its children's), E edges grouped by node.

    parent, token, depth: (N,) the node before, the token id that leads here, tokens said; the root
        has parent 0 and token -1.
    paths: (N, D) the node on the way here at depth 1, 2, ...; behind its own depth the node itself.
    in_edge: (N,) the edge that leads here; -1 for the root.
    levels: the nodes of depth 1, of depth 2, ...
    edges: (N + 1,) edges of node n are edges[n]:edges[n + 1], children by their first sentence.
    edge_node, edge_token: (E,) node it leaves, index of its token in `live_tokens`.
    edge_target: (E,) the child, or -1 - s where it completes sentence s.
    live_tokens: (V,) every token id that an edge carries, ascending; the end token is among them.
    end_node, end_edge: (S,) last node of each sentence and its edge with the end token.
    first, last: (N,) lowest and highest index of the sentences that begin with this node.
    branching: (N,) bool, more than one token may follow.
    needed: (N,) bool, a branching node is here or below: the only nodes a model must ever read.
    """

    sentences: tuple[str, ...]
    parent: np.ndarray
    token: np.ndarray
    depth: np.ndarray
    paths: np.ndarray
    in_edge: np.ndarray
    levels: tuple[slice, ...]
    edges: np.ndarray
    edge_node: np.ndarray
    edge_token: np.ndarray
    edge_target: np.ndarray
    live_tokens: np.ndarray
    end_node: np.ndarray
    end_edge: np.ndarray
    first: np.ndarray
    last: np.ndarray
    branching: np.ndarray
    needed: np.ndarray

    def __len__(self) -> int:
        return len(self.parent)

    def list_path(self, node: int) -> list[int]:
        """Nodes from the root (left out) to `node`."""
        return self.paths[node, : self.depth[node]].tolist()


def tokenize_sentences(
    tokenizer, sentences: Sequence[str], last_prompt_id: int, end_token: int, lead: str = ""
) -> list[list[int]]:
    """Canonical token ids of each sentence in its place: `lead` and it right behind the prompt's last token.

    Raises GrammarError, with the sentence and the reason, where the prompt's end changes a sentence's
    tokens or they spell something else.
    """
    before = tokenizer.decode([last_prompt_id], skip_special_tokens=False)
    alone = _encode(tokenizer, [lead + sentence for sentence in sentences])
    together = _encode(tokenizer, [before + lead + sentence for sentence in sentences])
    head = _encode(tokenizer, [before])[0]
    for sentence, ids, joined in zip(sentences, alone, together, strict=True):
        if joined != head + ids:
            raise GrammarError(f"{sentence!r} has other tokens behind {before!r}, the end of the prompt")
        if not ids or end_token in ids or tokenizer.decode(ids, clean_up_tokenization_spaces=False) != lead + sentence:
            raise GrammarError(f"{sentence!r} cannot be spelled in this tokenizer's tokens: {ids}")
    return alone


def check_prefixes(sentences: Sequence[str], tokens: Sequence[Sequence[int]]) -> None:
    """Raises GrammarError where a sentence goes on from another one, but its tokens do not: the model
    would have to choose the tokens of the first part by what comes after it.
    """
    known = {sentence: list(ids) for sentence, ids in zip(sentences, tokens, strict=True)}
    for sentence, ids in known.items():
        for length in range(1, len(sentence)):
            shorter = known.get(sentence[:length])
            if shorter is not None and ids[: len(shorter)] != shorter:
                raise GrammarError(f"the tokens of {sentence[:length]!r} do not begin those of {sentence!r}")


def _encode(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    lean = {"return_attention_mask": False, "return_token_type_ids": False}  # half of the time went into these
    return tokenizer(list(texts), add_special_tokens=False, **lean)["input_ids"]


def build_trie(sentences: Sequence[str], tokens: Sequence[Sequence[int]], end_token: int) -> TokenTrie:
    """The trie of sentences whose token ids are given, in the same order; each non-empty, all different.

    Raises GrammarError where two sentences have the same tokens, or as `check_prefixes`.
    """
    check_prefixes(sentences, tokens)
    children: list[dict[int, int]] = [{}]
    parent, token, depth, ends = [0], [-1], [0], []
    for ids in tokens:
        node = 0
        for token_id in ids:
            if token_id not in children[node]:
                children[node][token_id] = len(children)
                children.append({})
                parent.append(node)
                token.append(token_id)
                depth.append(depth[node] + 1)
            node = children[node][token_id]
        ends.append(node)
    if len(set(ends)) < len(ends):
        raise GrammarError("two sentences have the same tokens")
    order = np.argsort(depth, kind="stable")  # level order; within a level by first sentence
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    parent, token, depth = rank[np.array(parent)][order], np.array(token)[order], np.array(depth)[order]
    return _add_edges(tuple(sentences), parent, token, depth, rank[np.array(ends)], end_token)


def _add_edges(sentences, parent, token, depth, end_node, end_token) -> TokenTrie:
    num_nodes, num_sentences = len(parent), len(sentences)
    # One edge into every node but the root, then one end edge a sentence; grouped by the node they leave.
    source = np.concatenate([parent[1:], end_node])
    label = np.concatenate([token[1:], np.full(num_sentences, end_token)])
    order = np.argsort(source, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    target = np.concatenate([np.arange(1, num_nodes), -1 - np.arange(num_sentences)])
    live_tokens, edge_token = np.unique(label[order], return_inverse=True)
    degree = np.bincount(source, minlength=num_nodes)
    first, last = np.full(num_nodes, num_sentences), np.full(num_nodes, -1)
    first[end_node] = last[end_node] = np.arange(num_sentences)
    needed = degree > 1
    paths = np.repeat(np.arange(num_nodes)[:, None], depth[-1], axis=1)
    starts = np.searchsorted(depth, np.arange(1, depth[-1] + 2))
    levels = tuple(map(slice, starts[:-1], starts[1:]))
    for at, nodes in enumerate(levels):
        paths[nodes, :at] = paths[parent[nodes], :at]
    for nodes in reversed(levels):
        above = parent[nodes]
        np.minimum.at(first, above, first[nodes])
        np.maximum.at(last, above, last[nodes])
        np.logical_or.at(needed, above, needed[nodes])
    return TokenTrie(
        sentences=sentences,
        parent=parent,
        token=token,
        depth=depth,
        paths=paths,
        in_edge=np.concatenate([[-1], rank[: num_nodes - 1]]),
        levels=levels,
        edges=np.concatenate([[0], np.cumsum(degree)]),
        edge_node=source[order],
        edge_token=edge_token,
        edge_target=target[order],
        live_tokens=live_tokens,
        end_node=end_node,
        end_edge=rank[num_nodes - 1 :],
        first=first,
        last=last,
        branching=degree > 1,
        needed=needed,
    )
