"""What a step costs with examples in the prompt, once their KV is kept."""

import json
from collections.abc import Sequence
from time import perf_counter, process_time

import numpy as np

from vlm_local.bench.rounds import summarise_ms
from vlm_local.bench.steering import Steering, steer_tree
from vlm_local.bench.subject import Subject, load_subject
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.errors import ConfigError
from vlm_local.policy_options import PolicyOptions
from vlm_local.progress import track
from vlm_local.prompts import Example, build_prompt
from vlm_local.provenance import describe_machine
from vlm_local.types import GenerationRequest, Observation, Picture

_PHRASE = "move forward left, close gripper"
_WARM_UP = 2


def run(options: PolicyOptions, shape: str | None, layers: int | None, counts: Sequence[int], rounds: int) -> int:
    """Play a step with so many examples in the prompt, `rounds` times each, the counts in turns.

    Each count is a robot in the middle of its episode: what comes before the present picture is kept, the phrase is the
    last one again, and the fast posterior is asked for, as `serve` does. The first step of each, which reads the
    examples, is timed apart. With a model's folder, the time has the preparation of pictures and text in it; with
    --shape there is none. Prints a table, then one JSON object. Raises ConfigError as `load_subject`.
    """
    if rounds < 1 or not counts or min(counts) < 0:
        raise ConfigError("--rounds must be at least 1, and each number of --counts at least 0")
    subject = load_subject(options, shape, layers)
    robots = [_Robot(subject, count, is_prepared=shape is not None) for count in counts]
    first_ms = [robot.step() for robot in robots]
    times_ms: list[list[tuple[float, float]]] = [[] for _ in counts]
    for index in track(range(_WARM_UP + rounds), "examples", "round"):
        turn = index % len(robots)  # each count comes first as often
        for place in [*range(turn, len(robots)), *range(turn)]:
            taken_ms = robots[place].step()
            if index >= _WARM_UP:
                times_ms[place].append(taken_ms)
    wall_ms, cpu_ms = np.moveaxis(np.array(times_ms), -1, 0)  # (counts, rounds) each
    # Of the same round, each: a machine that is busy for a while is busy for all of them.
    ratios = {
        name: np.median(times / times[0], axis=1).round(3) for name, times in (("wall", wall_ms), ("cpu", cpu_ms))
    }
    names = list(map(str, counts))
    result = {
        "benchmark": "examples",
        **subject.about,
        "ms": dict(zip(names, map(summarise_ms, wall_ms.tolist()), strict=True)),
        "cpu_ms": dict(zip(names, map(summarise_ms, cpu_ms.tolist()), strict=True)),
        "first_step_cpu_ms": {name: round(cpu, 2) for name, (_, cpu) in zip(names, first_ms, strict=True)},
        "prompt_tokens": {str(robot.count): robot.num_tokens for robot in robots},
        "times_the_first": dict(zip(names, ratios["wall"].tolist(), strict=True)),
        "cpu_times_the_first": dict(zip(names, ratios["cpu"].tolist(), strict=True)),
        **describe_machine(),
    }
    for name, wall, cpu, first in zip(names, ratios["wall"], ratios["cpu"], first_ms, strict=True):
        tokens, step = result["prompt_tokens"][name], result["ms"][name]["p50"]
        print(
            f"{name:>3} examples   {tokens:>5} tokens   p50 {step:9.2f} ms   x{wall:.2f} ({cpu:.2f} in processor time)"
            f"   first step x{first[1] / result['cpu_ms'][name]['p50']:.1f}"
        )
    print(json.dumps(result))
    return 0


class _Robot:
    """One robot with `count` examples, and a decoder of its own."""

    def __init__(self, subject: Subject, count: int, is_prepared: bool):
        """is_prepared: requests are prepared before the clock starts."""
        self.count, self.num_tokens = count, 0
        self._subject, self._is_prepared = subject, is_prepared
        steering = Steering()
        steering.target = _PHRASE
        self._decoder = steer_tree(TreeDecoder(subject.loaded), steering)
        self._generator = np.random.default_rng(0)
        self._examples = [self._draw_example() for _ in range(count)]

    def _draw_example(self) -> Example:
        picture = Picture(self._generator.integers(0, 256, (256, 256, 3), dtype=np.uint8))
        return Example(picture, "put the spoon on the towel", self._generator.normal(size=7), _PHRASE)

    def step(self) -> tuple[float, float]:
        """Milliseconds of a step: on the clock, and of the processor, the better measure on a busy machine."""
        subject = self._subject
        image = self._generator.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        observation = Observation(image, "put the spoon on the towel", self._generator.normal(size=7))
        prompt = build_prompt(subject.template, observation, (), self._examples)
        request = GenerationRequest(
            image, prompt, subject.grammar.sentences, "robot", drafts=(_PHRASE,), posterior="fast"
        )
        prepared = subject.prepare(request) if self._is_prepared else None
        subject.wait()
        start, start_cpu = perf_counter(), process_time()
        prepared = prepared or subject.prepare(request)
        self._decoder.decode([prepared])
        subject.wait()
        self.num_tokens = len(prepared.input_ids)
        return 1e3 * (perf_counter() - start), 1e3 * (process_time() - start_cpu)
