"""Requests under way together on one KV cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from vlm_local.decoding.belief import Belief
from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import Head, LayerKV, Placed, copy_columns, open_cache, pick_columns, run_chunk
from vlm_local.decoding.layout import Row, lay_out
from vlm_local.decoding.prior import Prior
from vlm_local.decoding.reuse import PrefixStore
from vlm_local.decoding.strategies import Verdict
from vlm_local.decoding.trie import TokenTrie
from vlm_local.decoding.types import PreparedRequest
from vlm_local.types import GenerationRequest


@dataclass(frozen=True, eq=False)
class Ground:
    """What is made once for a list of sentences."""

    trie: TokenTrie
    prior: Prior
    head: Head


@dataclass(eq=False)
class Task:
    """One request on its way. kept: its first columns from an earlier step of the episode."""

    prepared: PreparedRequest
    ground: Ground
    kept: list[LayerKV]
    row: Row
    belief: Belief
    verdict: Verdict = field(default_factory=lambda: Verdict(None))
    num_read: int = 0
    num_forwards: int = 0
    is_draft_hit: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.prepared.request


def build_task(family: Family, ground: Ground, prepared: PreparedRequest, store: PrefixStore | None) -> Task:
    """store: where KV of this episode's last step may be; None to read the whole prompt."""
    ids = prepared.input_ids.numpy()
    positions, behind = family.position_prompt(prepared)
    kept = store.find(prepared.request.episode, ids[: count_reusable(family, prepared)]) if store else []
    row = Row(ground.trie, ids, positions, behind, kept[0][0].shape[1] if kept else 0)
    return Task(prepared, ground, kept, row, Belief(ground.trie))


def count_reusable(family: Family, prepared: PreparedRequest) -> int:
    """Leading tokens whose KV no image can have touched: those before the first placeholder, and none
    where the prompt attends to all of itself.
    """
    if family.is_bidirectional:
        return 0
    is_image = prepared.input_ids.numpy() == family.image_token_id
    return min(prepared.before_length, int(is_image.argmax()) if is_image.any() else 0)


class Session:
    """The cache of `tasks` and what of it is filled. The first `read` takes the prompts along."""

    def __init__(self, family: Family, tasks: Sequence[Task]):
        self.tasks = list(tasks)
        self._family = family
        self._cache = open_cache(family, [task.kept for task in tasks])
        self._filled = max(task.row.kept for task in tasks)
        self._is_fresh = True

    def read(self, nodes: Sequence[np.ndarray]) -> None:
        """One forward that tells each task's belief what is behind its `nodes` (ascending ids)."""
        family, tasks = self._family, self.tasks
        missing = [task.row.list_missing(each) for task, each in zip(tasks, nodes, strict=True)]
        chunk = lay_out([task.row for task in tasks], missing, self._filled, family.is_bidirectional, family.window)
        images = self._place_images() if self._is_fresh else ()
        hidden = run_chunk(family, self._cache, chunk, images)  # (B, T, hidden)
        for index, (task, wanted) in enumerate(zip(tasks, nodes, strict=True)):
            branching = wanted[task.ground.trie.branching[wanted]]
            picked = pick_columns(hidden, index, task.row.columns[branching] - self._filled)
            task.belief.learn(branching, self.score(task, branching, picked))
            task.num_read += len(wanted)
            task.num_forwards += 1
        self._filled += chunk.token_ids.shape[1]
        self._is_fresh = False

    def score(self, task: Task, nodes: np.ndarray, hidden: torch.Tensor) -> np.ndarray:
        """Hidden states (n, hidden) behind `nodes` -> logits (n, V) of the live tokens, on the CPU."""
        return task.ground.head.read(hidden).cpu().numpy()

    def _place_images(self) -> list[Placed]:
        features = self._family.encode_images([task.prepared for task in self.tasks])
        return [
            Placed(each, np.flatnonzero(task.row.prompt_ids[task.row.kept :] == self._family.image_token_id))
            for each, task in zip(features, self.tasks, strict=True)
        ]

    def keep_prefixes(self, store: PrefixStore) -> None:
        """Copy what the next step of each task's episode may use; nothing when it is there already."""
        for index, task in enumerate(self.tasks):
            count = count_reusable(self._family, task.prepared)
            if task.request.episode is not None and count > task.row.kept:
                layers = copy_columns(self._cache, index, task.row.prompt_columns[:count])
                store.keep(task.request.episode, task.row.prompt_ids[:count], layers)

    def narrow(self, stays: Sequence[bool]) -> None:
        """Go on with fewer tasks."""
        if not all(stays):
            chosen = np.flatnonzero(stays)
            self.tasks = [self.tasks[index] for index in chosen]
            self._cache.batch_select_indices(torch.as_tensor(chosen, device=self._family.device))
