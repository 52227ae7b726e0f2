"""Decoders whose model is made to say a given sentence: a bonus on the logits of its tokens.

The work is that of the model as it is; only the numbers that come out are pushed. So random weights
can play the sequences that real robots say.
"""

from collections.abc import Sequence

import numpy as np
import torch

from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.session import Session
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.decoding.trie import tokenize_sentences
from vlm_local.decoding.types import PreparedRequest
from vlm_local.types import Generation

BONUS = 6.0  # what a phrase gets from it is in the results, as said_probability


class Steering:
    """target: the sentence to say, None to let the model be."""

    target: str | None = None


class _SteeredSession(Session):
    def score(self, task, nodes: np.ndarray, hidden: torch.Tensor) -> np.ndarray:
        logits, trie, target = super().score(task, nodes, hidden), task.ground.trie, self.steering.target
        if target is not None:
            sentence = trie.sentences.index(target)
            said = trie.list_path(int(trie.end_node[sentence]))
            edges = np.array([*trie.in_edge[said], trie.end_edge[sentence]])
            for edge in edges[np.isin(trie.edge_node[edges], nodes)]:
                logits[np.searchsorted(nodes, trie.edge_node[edge]), trie.edge_token[edge]] += BONUS
        return logits


def steer_tree(decoder: TreeDecoder, steering: Steering) -> TreeDecoder:
    decoder.session_type = type("SteeredSession", (_SteeredSession,), {"steering": steering})
    return decoder


class SteeredOutlines(OutlinesDecoder):
    """`generate` asks the head once a token, so its n-th call is about the n-th token."""

    def __init__(self, loaded, steering: Steering):
        super().__init__(loaded)
        self._steering = steering
        self._bonus_ids: list[int] = []
        loaded.model.lm_head.register_forward_hook(self._push)

    def decode(self, prepared: Sequence[PreparedRequest]) -> list[Generation]:
        [each] = prepared
        if self._steering.target is not None:
            loaded = self._loaded
            sentence, last = [self._steering.target], int(each.input_ids[-1])
            [ids] = tokenize_sentences(loaded.tokenizer, sentence, last, loaded.eos_token_id, loaded.lead)
            self._bonus_ids = [*ids, loaded.eos_token_id]
        try:
            return super().decode(prepared)
        finally:
            self._bonus_ids = []

    def _push(self, module, inputs, logits: torch.Tensor) -> None:
        if self._bonus_ids:
            logits[..., -1, self._bonus_ids.pop(0)] += BONUS
