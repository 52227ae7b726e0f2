"""Every way of decoding plays the same steps, one after the other in each round."""

import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch

from vlm_local.bench.sequences import PlayedEpisode
from vlm_local.bench.steering import SteeredOutlines, Steering, steer_tree
from vlm_local.decoding.tree import Budget, TreeDecoder
from vlm_local.decoding.types import LoadedModel, PreparedRequest
from vlm_local.grammar import Grammar
from vlm_local.policy import Settings, VLMPolicy
from vlm_local.prompts import Template
from vlm_local.types import Generation, GenerationRequest, Observation

# What each way changes in the request that the robot's policy makes.
_WAYS = {
    "outlines": {},
    "trie": {"episode": None, "drafts": ()},
    "draft": {"episode": None},
    "served": {},  # the draft, and the KV of the text before the image kept
    "posterior_fast": {"episode": None, "posterior": "fast"},
    "posterior_exact": {"episode": None, "posterior": "exact"},
}
_NO_DRAFT = Budget(draft=1, step=1)


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under test. steers: it is made to say what the sequences say."""

    loaded: LoadedModel
    prepare: Callable[[GenerationRequest], PreparedRequest]
    grammar: Grammar
    template: Template
    settings: Settings
    steers: bool


class Contest:
    """Times of all ways on the same steps. times_ms, cpu_ms, generations: way -> one a timed step.

    cpu_ms is what this process used of its cores: the better measure where others are at work, too.
    """

    def __init__(self, subject: Subject):
        self._subject = subject
        self._steering = Steering()
        loaded = subject.loaded
        self._decoders = {
            way: SteeredOutlines(loaded, self._steering)
            if way == "outlines"
            else steer_tree(TreeDecoder(loaded, _NO_DRAFT if way == "trie" else Budget()), self._steering)
            for way in _WAYS
        }
        self.times_ms: dict[str, list[float]] = defaultdict(list)
        self.cpu_ms: dict[str, list[float]] = defaultdict(list)
        self.generations: dict[str, list[Generation]] = defaultdict(list)
        self.num_disagreements = 0
        self.num_followed = 0  # steps that were said as they were steered

    def play(self, episodes: Sequence[PlayedEpisode], num_steps: int) -> None:
        """Warm up on one step, then time whole episodes, spread evenly, until `num_steps` were timed."""
        mean = sum(len(episode.phrases) for episode in episodes) / len(episodes)
        count = min(len(episodes), max(1, round(num_steps / mean)))
        chosen = [episodes[index] for index in np.linspace(0, len(episodes) - 1, count).astype(int)]
        policy = self._build_policy()
        self._play_episode(policy, chosen[0], 1)
        self.num_disagreements = self.num_followed = 0
        for way in (*_WAYS, "prefill"):
            for told in (self.times_ms, self.cpu_ms, self.generations):
                told[way].clear()
        for episode in chosen:
            self._play_episode(policy, episode, num_steps - len(self.times_ms["prefill"]))

    def _play_episode(self, policy: VLMPolicy, episode: PlayedEpisode, num_steps: int) -> None:
        policy.reset(0)
        generator = np.random.default_rng(len(episode.phrases))
        for step, phrase in enumerate(episode.phrases[:num_steps]):
            noise = generator.integers(0, 256, (256, 256, 3), dtype=np.uint8), generator.normal(size=7)
            image = episode.load_image(step) if episode.load_image else noise[0]
            proprio = episode.proprios[step] if episode.proprios is not None else noise[1]
            self._steering.target = phrase if self._subject.steers else None
            policy.act(Observation(image, episode.instruction or "do the task", proprio))

    def _build_policy(self) -> VLMPolicy:
        subject = self._subject
        settings = replace(subject.settings, decide="greedy", posterior="off")
        return VLMPolicy(self._race, subject.grammar, subject.template, settings, forget=self._forget)

    def _forget(self, episode: str) -> None:
        for decoder in self._decoders.values():
            decoder.forget(episode)

    def _race(self, request: GenerationRequest) -> Generation:
        """One round: a prefill and every way, each round beginning with the next of them."""
        prepared = self._subject.prepare(request)
        runs: dict[str, Callable] = {"prefill": lambda: self._prefill(prepared)}
        for way, changes in _WAYS.items():
            each = replace(prepared, request=replace(request, **changes))
            runs[way] = lambda way=way, each=each: self._decoders[way].decode([each])[0]
        order = list(runs)
        first = len(self.times_ms["prefill"]) % len(order)
        answers = {}
        for way in order[first:] + order[:first]:
            answers[way] = self._time(way, runs[way])
            self.generations[way].append(answers[way])
        said = {answers[way].sentence for way in _WAYS}
        self.num_disagreements += len(said) > 1
        self.num_followed += answers["draft"].sentence == self._steering.target
        return answers["draft"]

    def _time(self, way: str, run: Callable) -> Generation | None:
        self._wait()
        start, start_cpu = perf_counter(), process_time()
        answer = run()
        self._wait()
        self.times_ms[way].append(1e3 * (perf_counter() - start))
        self.cpu_ms[way].append(1e3 * (process_time() - start_cpu))
        return answer

    def _wait(self) -> None:
        if self._subject.loaded.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def _prefill(self, prepared: PreparedRequest) -> None:
        """The unit of all times: one whole forward, vision included, head on the last row."""
        input_ids = prepared.input_ids[None].to(self._subject.loaded.device)
        ones = torch.ones_like(input_ids)
        self._subject.loaded.model(
            input_ids=input_ids, attention_mask=ones, **prepared.vision, use_cache=True, logits_to_keep=1
        ).logits.argmax().item()


def summarise_contest(contest: Contest) -> dict[str, Any]:
    """Times as multiples of the same round's prefill, and what the tree decoder did for them."""
    prefill, cpu_prefill = (np.array(times["prefill"]) for times in (contest.times_ms, contest.cpu_ms))
    drafts = contest.generations["draft"]
    exact = contest.generations["posterior_exact"]
    missing = np.array([each.missing_mass for each in contest.generations["posterior_fast"]])
    return {
        "x_prefill": {way: summarise(np.array(contest.times_ms[way]) / prefill) for way in _WAYS},
        "x_prefill_cpu": {way: summarise(np.array(contest.cpu_ms[way]) / cpu_prefill) for way in _WAYS},
        "prefill_ms": summarise(prefill),
        "served_ms": summarise(np.array(contest.times_ms["served"])),
        "forwards_per_step": {
            way: round(float(np.mean([each.stats["forwards"] for each in contest.generations[way]])), 3)
            for way in _WAYS
        },
        "draft_hit_rate": float(np.mean([each.stats["draft_hit"] for each in drafts])),
        "near_tie_rate": float(np.mean([each.stats["near_tie"] for each in drafts])),
        "disagreements": contest.num_disagreements,
        "followed_steering": contest.num_followed / len(prefill),
        "posterior_fast_missing_mass": summarise(missing) | {"certified_0.99": float((missing <= 0.01).mean())},
        "said_probability": summarise(np.array([each.probabilities.max() for each in exact])),
        "different_phrases": len({each.sentence for each in drafts}),
        "peak_memory_mb": _read_peak_memory_mb(),
    }


def summarise(values: np.ndarray) -> dict[str, float]:
    told = {"median": np.median(values), "mean": values.mean(), "p95": np.quantile(values, 0.95)}
    return {name: round(float(value), 4) for name, value in told.items()} | {"n": len(values)}


def _read_peak_memory_mb() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)
