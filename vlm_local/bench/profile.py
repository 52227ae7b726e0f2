"""Where the time of one served step goes: milliseconds by part, kernels, launches, copies and waits."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from vlm_local.bench import Measured
from vlm_local.bench.sequences import load_sequences
from vlm_local.bench.steering import Steering, steer_tree
from vlm_local.bench.subject import Subject, play_episode, summarise_ms
from vlm_local.decoding import session, tree
from vlm_local.decoding.distribution import TrieDistribution
from vlm_local.decoding.families import Family
from vlm_local.decoding.forward import DynamicKV
from vlm_local.decoding.static import StaticForwards, StaticKV
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.types import Generation, GenerationRequest

# Part of a step -> the functions that do it, each in a way of its own: where it is looked up, and its name.
_PARTS = {
    "vision": ((Family, "encode_images"), (StaticForwards, "encode_images")),
    "open KV": ((StaticForwards, "open"), (DynamicKV, "__init__")),
    "lay out": ((session, "lay_out"),),
    "language model": ((StaticKV, "run"), (DynamicKV, "run")),
    "head": ((session.Session, "score"),),
    "keep prefix": ((session.Session, "keep_prefixes"),),
    "learn": ((TrieDistribution, "learn"),),
    "select nodes": ((tree, "select_nodes"),),
    "decide": ((tree, "decide"),),
    "certify": ((tree, "certify"),),
}
_TRACED = 5  # steps under the profiler: each leaves thousands of events
_WARM_UP = 3
_TOP = 15  # kernels that are named in the result
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def measure(subject: Subject, num_steps: int) -> Measured:
    """Play one episode with `serve`'s own settings: untouched, with one thread of the CPU, part by part, and traced.

    Part by part the GPU is waited for at both ends of each, so their sum is more than the step.
    """
    player = _Player(subject)
    player.play(_WARM_UP)
    step_ms = player.play(num_steps)
    with _one_thread():
        one_thread_ms = player.play(num_steps)
    parts: dict[str, list[float]] = defaultdict(list)
    with _around_parts(lambda name: _timed(subject, parts[name])):
        player.play(num_steps)
    parts_ms = {name: sum(times) / num_steps for name, times in parts.items()}
    traced, trace = _trace(player)
    result: dict[str, Any] = {
        "benchmark": "profile",
        **subject.about,
        "step_ms": summarise_ms(step_ms),
        "one_thread_ms": summarise_ms(one_thread_ms),
        "parts": {name: {"ms": round(ms, 3), **traced[name]} for name, ms in parts_ms.items()},
        **trace,
    }
    medians, slow = ([result[name][which] for name in ("step_ms", "one_thread_ms")] for which in ("p50", "p99"))
    lines = [
        f"step: p50 {medians[0]:.2f} ms, p99 {slow[0]:.2f}; with one thread {medians[1]:.2f} and {slow[1]:.2f}",
        "by part, with a wait behind each:",
    ]
    lines += [
        f"  {name:16}{told['ms']:9.2f} ms{told['kernels']:9.1f} kernels{told['gpu_ms']:9.2f} ms of the GPU"
        for name, told in result["parts"].items()
    ]
    return lines, result


class _Player:
    """One robot that plays the generated sequence, steered, under `serve`'s own settings."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._steering = Steering()
        self._decoder = steer_tree(TreeDecoder(subject.loaded), self._steering)
        self._policy = subject.build_policy(self._answer, self._decoder.forget)
        self._episode = load_sequences(None)[1][0]
        self._times_ms: list[float] = []

    def play(self, num_steps: int) -> list[float]:
        """Milliseconds of each step's decoding, of an episode from its beginning."""
        self._times_ms = []
        while len(self._times_ms) < num_steps:
            play_episode(self._policy, self._episode, num_steps - len(self._times_ms), self._say)
        return self._times_ms

    def _say(self, phrase: str) -> None:
        self._steering.target = phrase

    def _answer(self, request: GenerationRequest) -> Generation:
        prepared = self._subject.prepare(request)
        [generation], taken_ms, _ = self._subject.time(lambda: self._decoder.decode([prepared]))
        self._times_ms.append(taken_ms)
        return generation


@contextmanager
def _one_thread() -> Iterator[None]:
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@contextmanager
def _around_parts(enter: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Run each part inside of `enter(its name)`."""

    def wrap(name: str, function: Callable) -> Callable:
        def run_inside(*args: Any, **kwargs: Any) -> Any:
            with enter(name):
                return function(*args, **kwargs)

        return run_inside

    with ExitStack() as stack:
        for name, places in _PARTS.items():
            for owner, attribute in places:
                stack.enter_context(patch.object(owner, attribute, wrap(name, getattr(owner, attribute))))
        yield


@contextmanager
def _timed(subject: Subject, times_ms: list[float]) -> Iterator[None]:
    subject.wait()
    start = perf_counter()
    yield
    subject.wait()
    times_ms.append(1e3 * (perf_counter() - start))


def _trace(player: _Player) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Per step: what the GPU did for each part, and for the whole."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with _around_parts(record_function), profile(activities=activities) as traced:
        player.play(_TRACED)
    events = list(traced.events() or ())
    parts: dict[str, Counter[str]] = {name: Counter() for name in _PARTS}
    for event in events:
        if event.name in parts and event.device_type == DeviceType.CPU:
            parts[event.name] += _count_kernels(event)
    kernels = [event for event in events if event.device_type == DeviceType.CUDA]
    kernels = [event for event in kernels if event.name not in parts]  # the parts' own spans on the GPU
    computing = [event for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]
    names: Counter[str] = Counter(event.name for event in events)
    longest: Counter = Counter()
    for event in computing:
        longest[event.name] += event.time_range.elapsed_us()
    whole = {
        "kernels": len(computing),
        "copies": sum(event.name.startswith("Memcpy") for event in kernels),
        "launches": sum(count for name, count in names.items() if "LaunchKernel" in name),
        "waits": sum(names[name] for name in _WAITS),
        "gpu_ms": sum(event.time_range.elapsed_us() for event in kernels) / 1e3,
        "torch_operations": sum(count for name, count in names.items() if name.startswith("aten::")),
    }
    per_part = {
        name: {"kernels": count["kernels"] / _TRACED, "gpu_ms": round(count["us"] / 1e3 / _TRACED, 4)}
        for name, count in parts.items()
    }
    return per_part, {
        "each_step": {name: round(value / _TRACED, 3) for name, value in whole.items()},
        "kernel_us_each_step": {name[:80]: round(us / _TRACED, 1) for name, us in longest.most_common(_TOP)},
    }


def _count_kernels(event) -> Counter:
    """Kernels that an event and what it called launched, and their microseconds."""
    found = Counter(kernels=len(event.kernels), us=sum(kernel.duration for kernel in event.kernels))
    for child in event.cpu_children:
        found += _count_kernels(child)
    return found
