"""What an answer costs in prefills: every way of decoding plays the same steps, one after the other in each round."""

import os
import resource
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vlm_local.bench import Measured
from vlm_local.bench.sequences import PlayedEpisode, load_sequences
from vlm_local.bench.steering import SteeredOutlines, Steering, steer_tree
from vlm_local.bench.subject import Subject, load_subject, play_episode, summarise_ms
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.decoding.tree import Budget, TreeDecoder
from vlm_local.engines.blank import BlankReadings, build_blank_request
from vlm_local.policy_options import PolicyOptions
from vlm_local.progress import open_bar
from vlm_local.types import Generation, GenerationRequest

# What each way changes in the request that the robot's policy makes.
_WAYS = {
    "outlines": {},
    "trie": {"episode": None, "drafts": ()},
    "draft": {"episode": None},
    "served": {},  # the draft, and the KV of the text before the image kept
    "served_fast": {"posterior": "fast"},  # what `serve` does unless told otherwise
    "served_contrast": {"posterior": "fast", "contrast": 1.0},  # the same, with the blank picture's reading taken out
    "served_growing": {"posterior": "fast"},  # the same without buffers of fixed shape: all that a CPU has anyway
    "posterior_fast": {"episode": None, "posterior": "fast"},
    "posterior_exact": {"episode": None, "posterior": "exact"},
}
_WAYS_OF_A_GPU = {"served_fused": {"posterior": "fast"}}  # with compiled layers: decoding/fused.py
_NO_DRAFT = Budget(draft=1, step=1)
_READ_BLANK = "read_blank"  # what `served_contrast` needs once an instruction


def measure(
    options: PolicyOptions, shape: str | None, layers: int | None, sequences: Path | None, rounds: int
) -> Measured:
    """A model plays pictures of --sequences as it will; without pictures, and a shape always, it is
    steered to say what the sequences say. options, shape, layers: as load_subject takes them.
    """
    source, episodes = load_sequences(sequences)
    start = perf_counter()
    subject = load_subject(options, shape, layers)
    load_s = perf_counter() - start
    steers = shape is not None or not all(episode.load_image for episode in episodes)
    contest = Contest(subject, steers)
    contest.play(episodes, rounds)
    result = {
        "benchmark": "decode",
        **subject.about,
        "sequences": source,
        "steered": steers,
        **summarise_contest(contest),
        "load_s": round(load_s, 2),
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores: others were at work
    }
    lines = [f"{'x prefill':18}{'median':>9}{'mean':>9}{'p95':>9}{'p50 ms':>10}{'p99 ms':>10}{'forwards':>11}   n"]
    for way, times in result["x_prefill"].items():
        numbers = "".join(f"{times[name]:9.2f}" for name in ("median", "mean", "p95"))
        ms = "".join(f"{result['ms'][way][name]:10.2f}" for name in ("p50", "p99"))
        lines.append(f"{way:18}{numbers}{ms}{result['forwards_per_step'][way]:11.2f}   {times['n']}")
    contrast, blank = (result[name]["median"] for name in ("contrast_x_served", "x_prefill_read_blank"))
    lines.append(f"a contrast: {contrast:.2f} x served_fast, and once an instruction {blank:.2f} prefills")
    return lines, result


class Contest:
    """Times of all ways on the same steps. ways: what each changes. times_ms, cpu_ms, generations: way -> one a step.

    cpu_ms is what this process used of its cores: the better measure where others are at work, too.
    """

    def __init__(self, subject: Subject, steers: bool):
        """steers: the model is made to say what the sequences say."""
        self._subject = subject
        self._steers = steers
        self._steering = Steering()
        self.ways = _WAYS | (_WAYS_OF_A_GPU if subject.loaded.device.type == "cuda" else {})
        self._decoders = self._build_decoders()
        self._blanks = BlankReadings(subject.prepare, self._decoders["served_contrast"])
        self.times_ms: dict[str, list[float]] = defaultdict(list)
        self.cpu_ms: dict[str, list[float]] = defaultdict(list)
        self.generations: dict[str, list[Generation]] = defaultdict(list)
        self.num_disagreements = 0
        self.num_followed = 0  # steps that were said as they were steered

    def _build_decoders(self) -> dict[str, Any]:
        """One for each way; those that differ in their requests alone share one, and its graphs on a GPU."""
        loaded = self._subject.loaded
        shared = steer_tree(TreeDecoder(loaded), self._steering)
        own = {
            "outlines": SteeredOutlines(loaded, self._steering),
            "trie": steer_tree(TreeDecoder(loaded, _NO_DRAFT), self._steering),
            "served_growing": steer_tree(TreeDecoder(loaded, is_static=False), self._steering),
            "served_fused": steer_tree(TreeDecoder(loaded, is_fused=True), self._steering),
        }
        return {way: own.get(way, shared) for way in self.ways}

    def play(self, episodes: Sequence[PlayedEpisode], num_steps: int) -> None:
        """Warm up on one step, then time whole episodes, spread evenly, until `num_steps` were timed."""
        mean = sum(len(episode.phrases) for episode in episodes) / len(episodes)
        count = min(len(episodes), max(1, round(num_steps / mean)))
        chosen = [episodes[index] for index in np.linspace(0, len(episodes) - 1, count).astype(int)]
        changes = {"decide": "greedy", "posterior": "off", "contrast": 1.0}
        policy = self._subject.build_policy(self._race, self._forget, **changes)
        play_episode(policy, chosen[0], 1, self._say)
        self.num_disagreements = self.num_followed = 0
        for way in (*self.ways, "prefill", _READ_BLANK):
            for told in (self.times_ms, self.cpu_ms, self.generations):
                told[way].clear()
        with open_bar("decode", num_steps) as bar:

            def say(phrase: str) -> None:
                self._say(phrase)
                bar.update()

            for episode in chosen:
                play_episode(policy, episode, num_steps - len(self.times_ms["prefill"]), say)

    def _say(self, phrase: str) -> None:
        self._steering.target = phrase if self._steers else None

    def _forget(self, episode: str) -> None:
        for way, decoder in self._decoders.items():
            decoder.forget(f"{way} {episode}")

    def _race(self, request: GenerationRequest) -> Generation:
        """One round: a prefill and every way, each round beginning with the next of them."""
        blank = self._subject.prepare(build_blank_request(request))
        target, self._steering.target = self._steering.target, None  # or the contrast would take the steering out
        prepared = self._blanks.add_to(self._subject.prepare(request))
        self._steering.target = target
        runs: dict[str, Callable] = {
            "prefill": lambda: self._prefill(prepared),
            _READ_BLANK: lambda: self._decoders["served_contrast"].read_blank(blank),
        }
        for way, changes in self.ways.items():
            own = {
                "episode": f"{way} {request.episode}",
                "contrast": 0.0,
                **changes,
            }  # ways that share a decoder keep apart
            each = replace(prepared, request=replace(request, **own))
            runs[way] = lambda way=way, each=each: self._decoders[way].decode([each])[0]
        order = list(runs)
        first = len(self.times_ms["prefill"]) % len(order)
        answers = {}
        for way in order[first:] + order[:first]:
            answers[way] = self._time(way, runs[way])
            self.generations[way].append(answers[way])
        said = {answers[way].sentence for way, changes in self.ways.items() if "contrast" not in changes}
        self.num_disagreements += len(said) > 1
        self.num_followed += answers["draft"].sentence == self._steering.target
        return answers["draft"]

    def _time(self, way: str, run: Callable) -> Generation | None:
        answer, taken_ms, cpu_ms = self._subject.time(run)
        self.times_ms[way].append(taken_ms)
        self.cpu_ms[way].append(cpu_ms)
        return answer

    @torch.inference_mode()
    def _prefill(self, prepared: PreparedRequest) -> None:
        """The unit of all times: one whole forward, vision included, head on the last row."""
        device = self._subject.loaded.device
        input_ids = prepared.input_ids[None].to(device)
        vision = {name: value.to(device) for name, value in prepared.vision.items()}
        self._subject.loaded.model(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **vision,
            use_cache=True,
            logits_to_keep=1,
        ).logits.argmax().item()


def summarise_contest(contest: Contest) -> dict[str, Any]:
    """Times as multiples of the same round's prefill, and what the tree decoder did for them."""
    prefill, cpu_prefill = (np.array(times["prefill"]) for times in (contest.times_ms, contest.cpu_ms))
    drafts = contest.generations["draft"]
    exact = contest.generations["posterior_exact"]
    missing = np.array([each.missing_mass for each in contest.generations["posterior_fast"]])
    return {
        "x_prefill": {way: summarise(np.array(contest.times_ms[way]) / prefill) for way in contest.ways},
        "x_prefill_read_blank": summarise(np.array(contest.times_ms[_READ_BLANK]) / prefill),
        "contrast_x_served": summarise(np.divide(contest.times_ms["served_contrast"], contest.times_ms["served_fast"])),
        "x_prefill_cpu": {way: summarise(np.array(contest.cpu_ms[way]) / cpu_prefill) for way in contest.ways},
        "ms": {way: summarise_ms(times) for way, times in contest.times_ms.items()},
        "forwards_per_step": {
            way: round(float(np.mean([each.stats["forwards"] for each in contest.generations[way]])), 3)
            for way in contest.ways
        },
        "draft_hit_rate": float(np.mean([each.stats["draft_hit"] for each in drafts])),
        "near_tie_rate": float(np.mean([each.stats["near_tie"] for each in drafts])),
        "disagreements": contest.num_disagreements,
        "followed_steering": contest.num_followed / len(prefill),
        "posterior_fast_missing_mass": summarise(missing) | {"certified_0.99": float((missing <= 0.01).mean())},
        "said_probability": summarise(
            np.array([each.probabilities.max() for each in exact if each.probabilities is not None])
        ),
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
