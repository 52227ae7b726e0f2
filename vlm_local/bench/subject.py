"""The model that a decoding benchmark measures, and the robot that asks it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter, process_time
from typing import Any, TypeVar

import numpy as np
import torch

from vlm_local.bench.sequences import PlayedEpisode
from vlm_local.bench.shapes import build_shape, prepare_for_shape
from vlm_local.decoding.families import LoadedModel
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.engines.loading import load_model
from vlm_local.engines.processing import Processing
from vlm_local.errors import ConfigError
from vlm_local.grammar import Grammar
from vlm_local.policy import Settings, VLMPolicy
from vlm_local.policy_options import PolicyOptions
from vlm_local.prompts import Example, Template, build_prompt
from vlm_local.resolved_options import ResolvedOptions
from vlm_local.types import Generation, GenerationRequest, Observation

PHRASE = "move forward left, close gripper"
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under test. about: what it is, for the result."""

    loaded: LoadedModel
    prepare: Callable[[GenerationRequest], PreparedRequest]
    grammar: Grammar
    template: Template
    settings: Settings
    about: dict[str, Any]

    def build_policy(
        self, answer: Callable[[GenerationRequest], Generation], forget: Callable[[str], None], **changes
    ) -> VLMPolicy:
        """A robot's policy that asks `answer`. changes: fields of Settings that the benchmark fixes."""
        return VLMPolicy(answer, self.grammar, self.template, replace(self.settings, **changes), forget=forget)

    def draw_request(
        self, generator: np.random.Generator, robot: str, examples: Sequence[Example] = ()
    ) -> GenerationRequest:
        """What `serve` asks in the middle of an episode, of noise: the last phrase again, and the fast posterior."""
        observation = draw_observation(generator)
        prompt = build_prompt(self.template, observation, (), examples)
        drafts = (PHRASE,)
        return GenerationRequest(
            observation.image, prompt, self.grammar.sentences, robot, drafts=drafts, posterior="fast"
        )

    def wait(self) -> None:
        """Until a GPU has done what it was told; a CPU has already."""
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)

    def time(self, run: Callable[[], _Answer]) -> tuple[_Answer, float, float]:
        """What `run` returns, its milliseconds, and those that this process used of its cores meanwhile."""
        self.wait()
        start, start_cpu = perf_counter(), process_time()
        answer = run()
        self.wait()
        return answer, 1e3 * (perf_counter() - start), 1e3 * (process_time() - start_cpu)


def load_subject(options: PolicyOptions, shape: str | None, layers: int | None) -> Subject:
    """The model that `options` name, or random weights of `shape`. layers: only so many of a shape's, None for all.

    Raises ConfigError where the weights are not here, or the shape is not known.
    """
    return _build_from_shape(options, shape, layers) if shape else _load_from_folder(options)


def draw_observation(generator: np.random.Generator, step: int = 0) -> Observation:
    """Noise, 256x256 and 7 numbers."""
    image = generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return Observation(image, "put the spoon on the towel", generator.normal(size=7), step)


def free_memory() -> None:
    """Give back what torch keeps of a GPU's memory for models that are gone."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summarise_ms(times: Sequence[float]) -> dict[str, float]:
    """Milliseconds of single steps -> their quantiles."""
    p50, p95, p99 = np.percentile(times, [50, 95, 99])
    return {"p50": round(p50, 3), "p95": round(p95, 3), "p99": round(p99, 3), "n": len(times)}


def _build_from_shape(options: PolicyOptions, shape: str, layers: int | None) -> Subject:
    parts = ResolvedOptions(replace(options, model="random"))
    best = {"device": "cuda:0" if torch.cuda.device_count() else "cpu", "dtype": "bfloat16"}
    device, dtype = (best[name] if parts.choose(name) == "auto" else parts.choose(name) for name in best)
    loaded = build_shape(shape, layers, torch.device(device), getattr(torch, dtype))
    about = {"shape": shape, "layers": layers} | _describe(loaded)
    return Subject(
        loaded,
        lambda request: prepare_for_shape(loaded, request),
        parts.grammar,
        parts.template,
        parts.settings,
        about,
    )


def _load_from_folder(options: PolicyOptions) -> Subject:
    parts = ResolvedOptions(options)
    if parts.checkpoint is None:
        raise ConfigError("this benchmark needs a model whose weights are here: --model NAME|FOLDER, or --shape")
    loaded = load_model(parts.checkpoint, *(parts.choose(name) for name in ("quantize", "device", "dtype")))
    processing = Processing(loaded.processor, loaded.family, loaded.dtype)
    trained = parts.checkpoint.sidecar.get("trained")
    about = {"model": parts.checkpoint.name, "checkpoint_sha256": parts.checkpoint.sha256, "trained": trained}
    return Subject(loaded, processing.prepare, parts.grammar, parts.template, parts.settings, about | _describe(loaded))


def _describe(loaded: LoadedModel) -> dict[str, Any]:
    on_gpu = loaded.device.type == "cuda"
    return {
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(loaded.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
    }


def play_episode(policy: VLMPolicy, episode: PlayedEpisode, num_steps: int, say: Callable[[str], None]) -> None:
    """Ask the policy for up to `num_steps` of an episode's steps, with its pictures or noise.

    say: called with each step's phrase before the policy is asked.
    """
    policy.reset(0)
    generator = np.random.default_rng(len(episode.phrases))
    for step, phrase in enumerate(episode.phrases[:num_steps]):
        noise = generator.integers(0, 256, (256, 256, 3), dtype=np.uint8), generator.normal(size=7)
        image = episode.load_image(step) if episode.load_image else noise[0]
        proprio = episode.proprios[step] if episode.proprios is not None else noise[1]
        say(phrase)
        policy.act(Observation(image, episode.instruction or "do the task", proprio, step))
