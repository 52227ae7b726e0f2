"""The default decoder: one forward reads the prompt and a part of the token trie together.

The trie's likeliest nodes are appended to the prompt as a tree under a 4D attention mask, so one
forward gives the distribution behind each of them. A strategy then decides, or says which nodes must
be read next; those follow on the same KV cache, again as a tree.
"""

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vlm_local.decoding.distribution import Prior, certify, decide, select_nodes
from vlm_local.decoding.families import Family, LoadedModel
from vlm_local.decoding.forward import Head
from vlm_local.decoding.fused import FusedLayers
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.decoding.session import DecodeTask, GrammarCache, PrefixStore, Session, build_task
from vlm_local.decoding.static import StaticForwards, can_capture
from vlm_local.decoding.trie import MAX_GRAMMARS, TokenTrie, build_trie, tokenize_sentences
from vlm_local.decoding.writing import ThoughtWriter
from vlm_local.errors import GrammarError
from vlm_local.types import Generation

# How close two tokens' log-probabilities must be for rounding to decide between them: a little above what a tree was
# seen to move them against each other. float32: 1.1e-4, eight inputs for each of nine small families; Qwen3.5 moves ten
# times as much as the others, and transformers' own two ways to compute it differ by as much. bfloat16: 0.296 with
# pretrained words (0.113 with small random families). float16 has three bits more: an eighth of that.
NEAR_TIE = {torch.float32: 2e-4, torch.float16: 0.04, torch.bfloat16: 0.3}

_KEPT_BYTES = 1 << 30  # of what is kept of all episodes together; a state of Qwen3.5's 4B alone is 50 MB
_MAX_EPISODES = 64  # whose last step is remembered for the next one's draft: 18 kB each


@dataclass(frozen=True)
class Budget:
    """How many nodes of the trie a forward takes along. Chosen by measurement: docs/benchmarks.md.

    draft: with the prompt. step: with each further forward, as long as it costs what one token does.
    fast, fast_step: the same while the fast posterior is wanted; fast_total: after which it gives up.
    """

    draft: int = 32
    step: int = 16
    fast: int = 64
    fast_step: int = 64
    fast_total: int = 192


# A GPU waits for the weights to come from its memory, so that nodes cost little and forwards much.
GPU_BUDGET = Budget(draft=96, step=64, fast=320, fast_step=192, fast_total=512)


class TreeDecoder:
    """Answers prepared requests together; keeps the prompt's KV before the image between steps."""

    session_type = Session  # benchmarks steer what it scores

    def __init__(
        self,
        loaded: LoadedModel,
        budget: Budget | None = None,
        is_static: bool | None = None,
        max_batch: int = 1,
        is_fused: bool = False,
    ):
        """budget: None for the device's own. max_batch: requests at once that a GPU is made ready for.

        is_static: forwards of fixed shapes, replayed as graphs on a GPU; None for a GPU that can replay them.
        is_fused: compile the layers of these forwards, which a GPU has yet to say is worth it.
        """
        self._loaded = loaded
        self._family = Family(loaded)
        on_gpu = loaded.device.type == "cuda"
        self._budget = budget or (GPU_BUDGET if on_gpu else Budget())
        captures = on_gpu and can_capture(self._family)
        is_static = captures if is_static is None else is_static
        fused = FusedLayers(self._family) if is_static and is_fused and not self._family.is_recurrent else None
        self._forwards = StaticForwards(self._family, captures, max_batch, fused) if is_static else None
        self._store = PrefixStore(_KEPT_BYTES)
        self.writer = ThoughtWriter(loaded, self._family, self._store)
        self._near_tie = NEAR_TIE[loaded.dtype]
        # In 16 bits a plain reading is another rounding: as far from float32, for several times the forwards.
        self._settles_ties = loaded.dtype == torch.float32
        self._keep_grammar = functools.lru_cache(MAX_GRAMMARS)(self._build_grammar)
        self._expected: OrderedDict[str, tuple[TokenTrie, np.ndarray]] = OrderedDict()

    @property
    def metadata(self) -> dict[str, Any]:
        """What is kept on a GPU beside the model; nothing on a CPU."""
        return {} if self._forwards is None else {"graphs": self._forwards.metadata}

    def forget(self, episode: str) -> None:
        """Drop the KV and the draft's prior of an episode."""
        self._store.forget(episode)
        self._expected.pop(episode, None)

    def refuse(self, prepared: PreparedRequest) -> str | None:
        """Why this decoder cannot answer a request's sentences, or None when it can."""
        grammar = self._find_grammar(prepared)
        return grammar if isinstance(grammar, str) else None

    @torch.inference_mode()
    def decode(self, prepared: Sequence[PreparedRequest]) -> list[Generation]:
        """Raises GrammarError for a request that `refuse` names."""
        with self._cleared_on_failure():
            return self._decode(prepared)

    @torch.inference_mode()
    def read_blank(self, prepared: PreparedRequest) -> np.ndarray:
        """Log-probabilities (E,) of all edges of the trie. prepared: wants the exact posterior. Raises as `decode`."""
        with self._cleared_on_failure():
            task = self._begin(prepared, store=None)
            self._run([task])
            return task.distribution.edge_log

    @contextmanager
    def _cleared_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            if self._forwards is not None:
                self._forwards.clear()
            raise

    def _decode(self, prepared: Sequence[PreparedRequest]) -> list[Generation]:
        tasks = [self._begin(each, self._store) for each in prepared]
        timings = self._run(tasks)
        near_ties = [task for task in tasks if self._is_near_tie(task)]
        if near_ties and self._settles_ties:
            before_plain = perf_counter()
            for task in near_ties:
                self._decide_plainly(task)
            timings["plain"] = 1e3 * (perf_counter() - before_plain)
        return [self._finish(task, timings, task in near_ties) for task in tasks]

    def _begin(self, prepared: PreparedRequest, store: PrefixStore | None) -> DecodeTask:
        grammar = self._find_grammar(prepared)
        if isinstance(grammar, str):
            raise GrammarError(grammar)
        task = build_task(self._family, grammar, prepared, store)
        trie, expected = self._expected.get(prepared.request.episode or "", (None, None))
        if trie is grammar.trie:
            task.expected = expected
        return task

    def _expect(self, task: DecodeTask) -> None:
        """Remember what the model thought, for the draft of the episode's next step."""
        episode = task.request.episode
        if episode is not None:
            self._expected.pop(episode, None)
            mass, _ = task.distribution.spread()
            self._expected[episode] = task.grammar.trie, mass
            if len(self._expected) > _MAX_EPISODES:
                self._expected.popitem(last=False)

    def _find_grammar(self, prepared: PreparedRequest) -> GrammarCache | str:
        """What was made for a request's sentences, or why this decoder cannot answer them."""
        return self._keep_grammar(prepared.request.sentences, int(prepared.input_ids[-1]))

    def _build_grammar(self, sentences: tuple[str, ...], last_prompt_id: int) -> GrammarCache | str:
        end_token = self._loaded.eos_token_id
        try:
            tokens = tokenize_sentences(self._loaded.tokenizer, sentences, last_prompt_id, end_token, self._loaded.lead)
            trie = build_trie(sentences, tokens, end_token)
        except GrammarError as error:
            return str(error)
        return GrammarCache(trie, Prior(trie), Head(self._family, trie.live_tokens))

    def _run(self, tasks: list[DecodeTask]) -> dict[str, float]:
        """Read until every task is decided and its posterior is what was asked for."""
        start = perf_counter()
        open_tasks = [(task, nodes) for task in tasks if (nodes := self._select(task)) is not None]
        if not open_tasks:  # each has only one thing to say
            return {}
        session = self._open_session([task for task, _ in open_tasks])
        session.read([nodes for _, nodes in open_tasks])
        session.keep_prefixes(self._store)
        prefilled = perf_counter()
        wanted = [self._select(task) for task in session.tasks]
        for task in session.tasks:
            task.is_draft_hit = task.choice.sentence is not None
        while any(nodes is not None for nodes in wanted):
            session.narrow([nodes is not None for nodes in wanted])
            session.read([nodes for nodes in wanted if nodes is not None])
            wanted = [self._select(task) for task in session.tasks]
        return {"prefill": 1e3 * (prefilled - start), "expand": 1e3 * (perf_counter() - prefilled)}

    def _open_session(self, tasks: list[DecodeTask]) -> Session:
        return self.session_type(self._family, tasks, self._forwards)

    def _select(self, task: DecodeTask) -> np.ndarray | None:
        """Nodes to read next, or None when nothing more is wanted. Decides the task when it can."""
        focus = self._find_focus(task)
        if focus is None:
            return None
        budget, trie = self._budget, task.grammar.trie
        first, further = budget.draft, budget.step
        if task.request.posterior == "fast":
            first, further = budget.fast, budget.fast_step
        limit = first if task.num_forwards == 0 else further
        if task.request.posterior == "exact":
            limit = len(trie)
        return select_nodes(trie, task.grammar.prior.weigh(task.request.drafts, task.expected), focus, limit)

    def _find_focus(self, task: DecodeTask) -> np.ndarray | None:
        request = task.request
        if task.choice.sentence is None:
            task.choice = decide(task.distribution, request, self._near_tie)
            if task.choice.sentence is None:
                return task.choice.focus
        gives_up = request.posterior == "fast" and task.num_read >= self._budget.fast_total
        return None if request.posterior == "off" or gives_up else certify(task.distribution, request.posterior)

    def _is_near_tie(self, task: DecodeTask) -> bool:
        """A sample has no such thing: a boundary of its CDF moved by rounding is the same distribution."""
        return task.choice.margin < self._near_tie

    def _decide_plainly(self, task: DecodeTask) -> None:
        """Decide again as a plain decoder would: the whole prompt alone, then token by token."""
        plain = self._begin(task.prepared, store=None)
        session = self._open_session([plain])
        while plain.choice.sentence is None:
            plain.choice = decide(plain.distribution, plain.request)
            if plain.choice.focus is not None:
                target = int(plain.choice.focus.argmax())
                path = plain.row.list_missing(np.array([target]))
                session.read([path[:1] if len(path) else np.array([target])])
        task.choice = plain.choice
        task.num_forwards += plain.num_forwards

    def _finish(self, task: DecodeTask, timings: dict[str, float], was_near_tie: bool) -> Generation:
        self._expect(task)
        probabilities = missing = None
        if task.request.posterior != "off":
            _, probabilities = task.distribution.spread()
            missing = max(0.0, 1.0 - float(probabilities.sum()))
        stats = {
            "forwards": task.num_forwards,
            "nodes": task.num_read,
            "draft_hit": float(task.is_draft_hit),
            "near_tie": float(was_near_tie),
            "reused_tokens": task.row.kept,
        }
        assert task.choice.sentence is not None  # `_run` ends with every task decided
        sentence = task.request.sentences[task.choice.sentence]
        return Generation(sentence, probabilities, missing, dict(timings), stats)
