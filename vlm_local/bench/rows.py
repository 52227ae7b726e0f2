"""How long a step takes for several robots at once, and what each of them gains by company."""

import json
from collections.abc import Sequence
from time import perf_counter

import numpy as np

from vlm_local.bench.rounds import summarise_ms
from vlm_local.bench.steering import Steering, steer_tree
from vlm_local.bench.subject import Subject, load_subject
from vlm_local.decoding.families import PreparedRequest
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.errors import ConfigError
from vlm_local.policy_options import PolicyOptions
from vlm_local.progress import track
from vlm_local.prompts import build_prompt
from vlm_local.provenance import describe_machine
from vlm_local.types import GenerationRequest, Observation

_PHRASE = "move forward left, close gripper"
_WARM_UP = 2


def run(options: PolicyOptions, shape: str | None, layers: int | None, counts: Sequence[int], rounds: int) -> int:
    """Decode a step of so many robots together, `rounds` times each, the counts in turns.

    The robots are in the middle of their episodes: the text before the image is kept, the phrase is
    the last one again, and the fast posterior is asked for, as `serve` does. Prints a table, then one
    JSON object. Raises ConfigError as `load_subject`.
    """
    if rounds < 1 or not counts or min(counts) < 1:
        raise ConfigError("--rounds and each number of --counts must be at least 1")
    subject = load_subject(options, shape, layers)
    steering = Steering()
    steering.target = _PHRASE
    decoder = steer_tree(TreeDecoder(subject.loaded, max_batch=max(counts)), steering)
    times_ms: dict[int, list[float]] = {count: [] for count in counts}
    generator = np.random.default_rng(0)
    for step in track(range(_WARM_UP + rounds), "rows", "round"):
        for count in counts:
            prepared = [_prepare(subject, generator, index) for index in range(count)]
            taken_ms = _time(subject, decoder, prepared)
            if step >= _WARM_UP:
                times_ms[count].append(taken_ms)
    one = np.array(times_ms[counts[0]])
    result = {
        "benchmark": "rows",
        **subject.about,
        "ms": {str(count): summarise_ms(times) for count, times in times_ms.items()},
        # Of the same round, each: a machine that is busy for a while is busy for all of them.
        "times_the_first": {
            str(count): round(float(np.median(np.array(times) / one)), 3) for count, times in times_ms.items()
        },
        **describe_machine(),
    }
    for count in map(str, counts):
        times, ratio = result["ms"][count], result["times_the_first"][count]
        print(f"{count:>3} rows   p50 {times['p50']:9.2f} ms   p99 {times['p99']:9.2f} ms   x{ratio:.2f}")
    print(json.dumps(result))
    return 0


def _prepare(subject: Subject, generator: np.random.Generator, robot: int) -> PreparedRequest:
    image = generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)
    observation = Observation(image, "put the spoon on the towel", generator.normal(size=7))
    prompt = build_prompt(subject.template, observation, [])
    return subject.prepare(
        GenerationRequest(
            image, prompt, subject.grammar.sentences, episode=str(robot), drafts=(_PHRASE,), posterior="fast"
        )
    )


def _time(subject: Subject, decoder: TreeDecoder, prepared: list[PreparedRequest]) -> float:
    subject.wait()
    start = perf_counter()
    decoder.decode(prepared)
    subject.wait()
    return 1e3 * (perf_counter() - start)
