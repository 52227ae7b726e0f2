"""Requests that are decoded together on one KV cache, and the KV that an episode keeps between its steps."""

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import torch

from vlm_local.decoding.distribution import Choice, Prior, TrieDistribution
from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import Head, Kept, PlacedImage
from vlm_local.decoding.layout import Row, lay_out
from vlm_local.decoding.prepared import PreparedPicture, PreparedRequest, join_features
from vlm_local.decoding.recurrent import open_kv
from vlm_local.decoding.static import RESERVE, StaticForwards, StaticKV
from vlm_local.decoding.trie import TokenTrie
from vlm_local.types import GenerationRequest

_FEW = 8  # columns that are not worth a state of their own: the number of a step, and words before it


@dataclass(frozen=True, eq=False)
class _Entry:
    keys: np.ndarray  # (n,) of the columns, as Family.hash_columns gives them
    kept: Kept


Slot = Literal["step", "shared", "ahead"]


class PrefixStore:
    """KV and states of each episode's prompt before the present image, kept between its steps.

    What is kept is a copy of the columns before the present image's first token, those of earlier pictures included.
    Attention looks back only, so no later image has touched it. An episode has an entry of its last step, one of what
    its prompts share where that cannot be cut out of the last step's (a state), and one that was read ahead for a
    prompt that a later step will have. The least recently used go when all together pass `max_bytes`.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, Slot], _Entry] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        return sum(entry.kept.nbytes for entry in self._entries.values())

    def find(self, episode: str | None, keys: np.ndarray) -> tuple[Kept | None, int]:
        """What is kept of columns whose tokens and pictures, from the first on, are those of `keys` (n,), or None; and
        how many of an earlier prompt of the episode are the same, whether or not that many can be used.
        """
        best, kept, most = None, None, 0
        if episode is None:
            return kept, most
        for slot in get_args(Slot):
            if (entry := self._entries.get((episode, slot))) is None:
                continue
            same = _count_same(entry.keys, keys)
            usable = entry.kept.cut(same)
            if usable and (kept is None or usable.num_columns > kept.num_columns):
                best, kept = slot, usable
            most = max(most, same)
        if best is not None:
            used = self._entries.pop((episode, best))
            # What was read ahead is the last step's from now on: the step has come for which it was read.
            self._entries[episode, "step" if best == "ahead" else best] = used
        return kept, most

    def keep(self, episode: str, keys: np.ndarray, kept: Kept, slot: Slot = "step") -> None:
        """kept: of the columns of exactly `keys`, in memory of its own."""
        self._entries.pop((episode, slot), None)
        self._entries[episode, slot] = _Entry(keys, kept)
        while self.num_bytes > self._max_bytes:
            self._entries.popitem(last=False)

    def forget(self, episode: str) -> None:
        for slot in get_args(Slot):
            self._entries.pop((episode, slot), None)


def _count_same(keys: np.ndarray, others: np.ndarray) -> int:
    """How many are the same, from the first on."""
    shorter = min(len(keys), len(others))
    differs = np.flatnonzero(keys[:shorter] != others[:shorter])
    return int(differs[0]) if len(differs) else shorter


@dataclass(frozen=True, eq=False)
class GrammarCache:
    """What is computed once for a list of sentences: its trie, the draft's prior and the rows of the output head."""

    trie: TokenTrie
    prior: Prior
    head: Head


@dataclass(eq=False)
class DecodeTask:
    """One request that is being decoded.

    keys: int64 (L,) of the prompt's columns, see Family.hash_columns.
    kept: what its first columns left in an earlier step of the episode, or None. slot: of what it leaves itself.
    expected: float64 (N,) probability of the trie's nodes one step ago, or None; only the draft uses it.
    num_read: nodes read so far. is_draft_hit: whether the first forward settled the choice.
    """

    prepared: PreparedRequest
    grammar: GrammarCache
    keys: np.ndarray
    kept: Kept | None
    row: Row
    slot: Slot
    distribution: TrieDistribution
    choice: Choice = field(default_factory=lambda: Choice(None))
    expected: np.ndarray | None = None
    num_read: int = 0
    num_forwards: int = 0
    is_draft_hit: bool = False

    @property
    def request(self) -> GenerationRequest:
        return self.prepared.request


def build_task(
    family: Family, grammar: GrammarCache, prepared: PreparedRequest, store: PrefixStore | None
) -> DecodeTask:
    """A task with nothing read yet. store: KV of this episode's last step; None to read the whole prompt again."""
    ids = prepared.input_ids.numpy()
    positions, behind = family.position_prompt(prepared)
    keys = family.hash_columns(prepared)
    num_reusable = count_reusable(family, prepared)
    kept, num_same = store.find(prepared.request.episode, keys[:num_reusable]) if store else (None, 0)
    num_kept = kept.num_columns if kept else 0
    keep, slot = num_reusable, "step"
    if family.is_recurrent and num_same:
        keep, slot = _place_state(keys[:num_reusable], num_kept, num_same)
    blocks = family.find_blocks(prepared)
    row = Row(grammar.trie, ids, positions, behind, blocks, num_kept, keep, family.cuts_blocks)
    distribution = TrieDistribution(grammar.trie, find_taken_out(prepared))
    return DecodeTask(prepared, grammar, keys, kept, row, slot, distribution)


def _place_state(keys: np.ndarray, num_kept: int, num_same: int) -> tuple[int, Slot]:
    """Behind how many columns a state is kept, and as what. It serves only where all before it is the same.

    First where the prompt parts from an earlier one: what has changed will change again, what is before it stays. Where
    that is kept, behind the last earlier picture (all, if there is none): frames stay for some steps, or others follow.
    keys: of the reusable columns. num_kept: how many are kept. num_same: how many an earlier prompt has, too.
    """
    if num_same > num_kept + _FEW:
        return num_same, "shared"
    pictures = np.flatnonzero(keys < 0)
    return (int(pictures[-1]) + 1 if len(pictures) else len(keys)), "step"


def find_taken_out(prepared: PreparedRequest) -> np.ndarray | None:
    """alpha log p0 of each choice, in the order of the decoder that read it; None without a contrast."""
    if not prepared.request.contrast:
        return None
    assert prepared.blank_log is not None  # the engine has the blank picture read before it decodes
    return prepared.request.contrast * prepared.blank_log


def count_reusable(family: Family, prepared: PreparedRequest) -> int:
    """Leading tokens whose KV the present image cannot have touched: those before its first placeholder, and before all
    that sees it from there.
    """
    places = np.flatnonzero(prepared.input_ids.numpy() == family.image_token_id)
    num_earlier = sum(picture.num_tokens for picture in prepared.earlier)
    if len(places) <= num_earlier:
        return 0
    first, blocks = int(places[num_earlier]), family.find_blocks(prepared)
    is_seeing = (blocks == blocks[first]) & (blocks >= 0)
    return min(prepared.before_length, first, int(is_seeing.argmax()) if is_seeing.any() else first)


def list_unread(family: Family, prepared: PreparedRequest, kept: int) -> list[PreparedPicture]:
    """The earlier pictures that are not in the first `kept` columns, which never end inside a picture."""
    num_kept = int((prepared.input_ids[:kept] == family.image_token_id).sum())
    ends = np.cumsum([picture.num_tokens for picture in prepared.earlier])
    return [picture for picture, end in zip(prepared.earlier, ends, strict=True) if end > num_kept]


def _expect_columns(task: DecodeTask) -> int:
    """For the prompt and the nodes that will most likely be read."""
    wants_all = task.request.posterior == "exact"
    return len(task.row.prompt_ids) + (int(task.grammar.trie.needed.sum()) if wants_all else RESERVE)


class Session:
    """The KV of `tasks` and what of it is filled. The first `read` takes the prompts along."""

    def __init__(self, family: Family, tasks: Sequence[DecodeTask], forwards: StaticForwards | None = None):
        """forwards: buffers of fixed shape to run in where the tasks fit. Where earlier pictures must be read they
        do not: no chunk is as long at most steps, and each length is a graph.
        """
        self.tasks = list(tasks)
        self._family = family
        self._forwards = forwards
        kept = [task.kept for task in tasks]
        num_columns = max(map(_expect_columns, tasks))
        self._unread = [list_unread(family, task.prepared, task.row.kept) for task in tasks]
        static = forwards.open(kept, num_columns, has_unread=any(self._unread)) if forwards else None
        self._kv = static or open_kv(family, kept)
        self._is_fresh = True

    def read(self, nodes: Sequence[np.ndarray]) -> None:
        """Run one forward that fills in each task's distribution at its `nodes` (ascending ids)."""
        family, tasks = self._family, self.tasks
        missing = [task.row.list_missing(each) for task, each in zip(tasks, nodes, strict=True)]
        start = self._kv.filled
        chunk = lay_out([task.row for task in tasks], missing, start, family.window, self._kv.align)
        if isinstance(self._kv, StaticKV) and not self._kv.fits(chunk):
            self._kv = self._kv.grow()
        images = self._place_images() if self._is_fresh else ()
        branching = [each[task.grammar.trie.branching[each]] for task, each in zip(tasks, nodes, strict=True)]
        picks = [task.row.columns[each] - start for task, each in zip(tasks, branching, strict=True)]
        hidden = self._kv.run(chunk, images, picks)
        for task, each, wanted, logits in zip(tasks, nodes, branching, self.score(branching, hidden), strict=True):
            task.distribution.learn(wanted, logits)
            task.num_read += len(each)
            task.num_forwards += 1
        self._is_fresh = False

    def score(self, nodes: Sequence[np.ndarray], hidden: Sequence[torch.Tensor]) -> list[np.ndarray]:
        """For each task hidden states (n, hidden) behind its `nodes` -> logits (n, V) of its live tokens, on
        the CPU. It is the one place where a GPU is waited for.
        """
        logits = [task.grammar.head.read(each) for task, each in zip(self.tasks, hidden, strict=True)]
        flat = torch.cat([each.flatten() for each in logits]).cpu().numpy()
        ends = np.cumsum([each.numel() for each in logits])
        return [part.reshape(each.shape) for part, each in zip(np.split(flat, ends[:-1]), logits, strict=True)]

    def _place_images(self) -> list[PlacedImage]:
        """The features of each task's unread pictures together, the present one's last."""
        prepared = [task.prepared for task in self.tasks]
        features = self._forwards.encode_images(prepared) if self._forwards else self._family.encode_images(prepared)
        store = self._family.earlier
        earlier = iter(store.find([each for unread in self._unread for each in unread]))
        for each, present in zip(prepared, features, strict=True):
            if each.key is not None:
                store.keep(each.key, present)
        return [
            PlacedImage(
                join_features([*itertools.islice(earlier, len(unread)), present]),
                np.flatnonzero(task.row.prompt_ids[task.row.kept :] == self._family.image_token_id),
            )
            for unread, present, task in zip(self._unread, features, self.tasks, strict=True)
        ]

    def keep_prefixes(self, store: PrefixStore) -> None:
        """Copy what the next step of each task's episode may use; nothing when it is there already."""
        for index, task in enumerate(self.tasks):
            count = task.row.keep
            if task.request.episode is not None and count > task.row.kept:
                kept = self._kv.copy_columns(index, task.row.prompt_columns[:count])
                store.keep(task.request.episode, task.keys[:count], kept, task.slot)

    def narrow(self, stays: Sequence[bool]) -> None:
        """Go on with fewer tasks."""
        if not all(stays):
            chosen = np.flatnonzero(stays)
            self.tasks = [self.tasks[index] for index in chosen]
            self._kv.narrow(chosen)
