"""Decoders whose model is made to say a given sentence: a bonus on the logits of its tokens.

The work is that of the model as it is; only the numbers that come out are pushed. So random weights
can play the sequences that real robots say.
"""

from collections.abc import Sequence

import numpy as np
import torch

from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.decoding.session import Session
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.decoding.trie import TokenTrie, tokenize_sentences
from vlm_local.types import Generation

BONUS = 6.0  # what a phrase gets from it is in the results, as said_probability


class Steering:
    """target: the sentence to say, None to let the model be."""

    target: str | None = None


class _SteeredSession(Session):
    steering: Steering

    def score(self, nodes: Sequence[np.ndarray], hidden: Sequence[torch.Tensor]) -> list[np.ndarray]:
        scores = super().score(nodes, hidden)
        if self.steering.target is not None:
            for task, read, logits in zip(self.tasks, nodes, scores, strict=True):
                _push(task.grammar.trie, self.steering.target, read, logits)
        return scores


def _push(trie: TokenTrie, target: str, nodes: np.ndarray, logits: np.ndarray) -> None:
    sentence = trie.sentences.index(target)
    said = trie.list_path(int(trie.end_node[sentence]))
    edges = np.array([*trie.in_edge[said], trie.end_edge[sentence]])
    for edge in edges[np.isin(trie.edge_node[edges], nodes)]:
        logits[np.searchsorted(nodes, trie.edge_node[edge]), trie.edge_token[edge]] += BONUS


def steer_tree(decoder: TreeDecoder, steering: Steering) -> TreeDecoder:
    decoder.session_type = type("SteeredSession", (_SteeredSession,), {"steering": steering})
    return decoder


class SteeredOutlines(OutlinesDecoder):
    """Pushes the target's next token as long as the answer has followed the target, as the tree does."""

    def __init__(self, loaded, steering: Steering):
        super().__init__(loaded)
        self._steering = steering
        self._target: list[int] = []

    def decode(self, prepared: Sequence[PreparedRequest]) -> list[Generation]:
        [each] = prepared
        self._target = []
        if self._steering.target is not None:
            loaded = self._loaded
            sentence, last = [self._steering.target], int(each.input_ids[-1])
            [ids] = tokenize_sentences(loaded.tokenizer, sentence, last, loaded.eos_token_id, loaded.lead)
            self._target = [*ids, loaded.eos_token_id]
        self._prompt_length = len(each.input_ids)
        return super().decode(prepared)

    def list_processors(self, grammar: str) -> list:
        return [self._push, *super().list_processors(grammar)]

    def _push(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids[0, self._prompt_length :].tolist()
        if said == self._target[: len(said)] and len(said) < len(self._target):
            scores[:, self._target[len(said)]] += BONUS
        return scores
