"""The model before pictures of the simulator: its decoder against outlines, and how long a step takes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from vlm_local.actions import GripperLatch, build_action
from vlm_local.bench.limit import find_least_step_ms, measure_rates
from vlm_local.bench.subject import Subject, summarise_ms
from vlm_local.decoding.outlines import OutlinesDecoder
from vlm_local.decoding.prepared import PreparedRequest
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.environments import OURS, find_suite
from vlm_local.lab.closed_loop.environment import State
from vlm_local.lab.closed_loop.process import EnvironmentProcess, borrow_environment
from vlm_local.policy import VLMPolicy
from vlm_local.primitives import parse_phrase
from vlm_local.types import Generation, GenerationRequest

LEVEL, IMAGE_SIZE = "normal", 256
_SHOWN = 5  # pictures of an episode
_FIRST_SEED = 1000  # of the episodes shown, apart from those that `sim` plays
_WARM_UP = 3
_AT_LEAST = 8  # pictures, however short the time

Row = Mapping[str, Any]


def compare_decoders(
    subject: Subject, num_pictures: int, seconds: float, known: Sequence[Row], keep: Callable[[Row], None]
) -> None:
    """Answer pictures with the tree decoder as it serves, and with outlines; a row (scores.py) a picture.

    known: rows of the first pictures, which are not answered again. keep: is given every other row at once.
    Ends early, with _AT_LEAST pictures or more, after `seconds`.
    """
    race = _Race(subject)
    policy = subject.build_policy(race.answer, race.forget, decide="greedy", contrast=0.0)
    end = perf_counter() + seconds
    with borrow_environment(OURS, LEVEL, IMAGE_SIZE) as environment:
        for number, task, state in _show_pictures(environment, num_pictures):
            if number < len(known):
                continue
            if number >= _AT_LEAST and perf_counter() > end:
                break
            phrase = _act(policy, state, number)
            keep({"picture": number, "task": task, "phrase": phrase, **race.told, "oracle": state.oracle})


class _Race:
    """Two decoders, one after the other. told: of the last request, fields of a row."""

    def __init__(self, subject: Subject):
        self._subject = subject
        self._tree, self._outlines = TreeDecoder(subject.loaded), OutlinesDecoder(subject.loaded)
        self.forget = self._tree.forget
        self.told: dict[str, Any] = {}
        self._is_warm = False

    def answer(self, request: GenerationRequest) -> Generation:
        prepared = self._subject.prepare(request)
        # The phrase alone: for probabilities, outlines would read every sentence.
        plain = replace(prepared, request=replace(request, posterior="off"))
        if not self._is_warm:
            self._run(self._tree, prepared)
            self._run(self._outlines, plain)
            self.forget(request.episode or "")
            self._is_warm = True
        mine, ms = self._run(self._tree, prepared)
        theirs, outlines_ms = self._run(self._outlines, plain)
        self.told = {"outlines": theirs.sentence, "near_tie": bool(mine.stats["near_tie"])}
        self.told |= {"ms": round(ms, 3), "outlines_ms": round(outlines_ms, 3)}
        return mine

    def _run(self, decoder: TreeDecoder | OutlinesDecoder, prepared: PreparedRequest) -> tuple[Generation, float]:
        [answer], taken_ms, _ = self._subject.time(lambda: decoder.decode([prepared]))
        return answer, taken_ms


def time_steps(subject: Subject, num_steps: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of whole steps under `serve`'s own settings, prompt to action, and the least that they could take.

    Ends early, with _AT_LEAST steps or more, after `seconds`.
    """
    decoder = TreeDecoder(subject.loaded)
    seen: list[PreparedRequest] = []
    generations: list[Generation] = []

    def answer(request: GenerationRequest) -> Generation:
        seen[:] = [subject.prepare(request)]
        generations.extend(decoder.decode(seen))
        return generations[-1]

    policy = subject.build_policy(answer, decoder.forget, contrast=0.0)
    times: list[float] = []
    end = perf_counter() + seconds
    with borrow_environment(OURS, LEVEL, IMAGE_SIZE) as environment:
        for number, _, state in _show_pictures(environment, _WARM_UP + num_steps):
            if len(times) >= _AT_LEAST and perf_counter() > end:
                break
            start = perf_counter()
            _act(policy, state, number)
            subject.wait()
            if number >= _WARM_UP:
                times.append(1e3 * (perf_counter() - start))
    rates = measure_rates(subject)
    least_ms, ms = find_least_step_ms(subject, seen[0], rates), summarise_ms(times)
    return {
        "ms": ms,
        "least_ms": round(least_ms, 4),
        "share_of_limit": round(least_ms / ms["p50"], 4),
        "copy_gb_per_s": round(rates.bytes_per_s / 1e9, 1),
        "product_tflop_per_s": round(rates.operations_per_s / 1e12, 2),
        "forwards_per_step": sum(each.stats["forwards"] for each in generations[_WARM_UP:]) / len(times),
    }


def _act(policy: VLMPolicy, state: State, number: int) -> str:
    """The policy's phrase; every _SHOWN pictures begin an episode."""
    if number % _SHOWN == 0:
        policy.reset(0)
    phrase = policy.act(state.observation).phrase
    assert phrase is not None  # a VLM says nothing else
    return phrase


def _show_pictures(environment: EnvironmentProcess, num: int) -> Iterator[tuple[int, str, State]]:
    """(number, task, state) of pictures from the beginnings of episodes of all tasks, in which the oracle acts."""
    suite = find_suite(OURS)
    for first in range(0, num, _SHOWN):
        episode = first // _SHOWN
        task, latch = suite.tasks[episode % len(suite.tasks)], GripperLatch()
        state = environment.reset(task, _FIRST_SEED + episode)
        for number in range(first, min(first + _SHOWN, num)):
            yield number, task, state
            primitive = parse_phrase(state.oracle)
            command = latch.update(primitive.gripper, state.observation.opening)
            state = environment.step(build_action(primitive, command, suite.table))
