"""What a step costs with examples in the prompt, once their KV is kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_local.bench import Measured
from vlm_local.bench.steering import Steering, steer_tree
from vlm_local.bench.subject import PHRASE, Subject, draw_observation, summarise_ms
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.progress import track
from vlm_local.prompts import Example
from vlm_local.types import Generation, Picture

_WARM_UP = 2
_RATIOS = ("times_the_first", "cpu_times_the_first", "cpu_times_the_first_alike")


def measure(subject: Subject, counts: Sequence[int], rounds: int, is_prepared: bool) -> Measured:
    """Play a step with so many examples in the prompt, `rounds` times each, the counts in turns.

    Each count is a robot in the middle of its episode: what comes before the present picture is kept, the phrase is the
    last one again, and the fast posterior is asked for, as `serve` does. The first step of each, which reads the
    examples, is timed apart. is_prepared: pictures and text are prepared before the clock starts, as for a shape, which
    needs none of it. How many forwards a step takes is the model's own doubt, which examples change; so ratios are also
    told of those rounds alone in which a count took as many as the first.
    """
    robots = [_Robot(subject, count, is_prepared) for count in counts]
    first_ms = [robot.step() for robot in robots]
    told: list[list[tuple[float, float, int]]] = [[] for _ in counts]
    for index in track(range(_WARM_UP + rounds), "examples", "round"):
        turn = index % len(robots)  # each count comes first as often
        for place in [*range(turn, len(robots)), *range(turn)]:
            step = robots[place].step()
            if index >= _WARM_UP:
                told[place].append(step)
    wall_ms, cpu_ms, forwards = np.moveaxis(np.array(told), -1, 0)  # (counts, rounds) each
    names = list(map(str, counts))
    first_cpu_ms = {name: round(cpu, 2) for name, (_, cpu, _) in zip(names, first_ms, strict=True)}
    tokens = {str(robot.count): robot.num_tokens for robot in robots}
    result = _summarise(names, wall_ms, cpu_ms, forwards)
    lines = []
    for name in names:
        wall, cpu, alike = (result[each][name] for each in _RATIOS)
        step_ms, first = result["ms"][name]["p50"], first_cpu_ms[name] / result["cpu_ms"][name]["p50"]
        lines.append(
            f"{name:>3} examples   {tokens[name]:>5} tokens   p50 {step_ms:9.2f} ms   x{wall:.2f} ({cpu:.2f} in "
            f"processor time; {alike or '-'} with as many forwards)   first step x{first:.1f}"
        )
    about = {"benchmark": "examples", **subject.about, "first_step_cpu_ms": first_cpu_ms, "prompt_tokens": tokens}
    return lines, about | result


def _summarise(names: Sequence[str], wall_ms: np.ndarray, cpu_ms: np.ndarray, forwards: np.ndarray) -> dict[str, Any]:
    """By count. wall_ms, cpu_ms, forwards: of each step, (counts, rounds); ratios to the first count are of the same
    round each, as a machine that is busy for a while is busy for all of them.
    """
    alike = forwards == forwards[0]
    told = {
        "ms": [summarise_ms(times) for times in wall_ms.tolist()],
        "cpu_ms": [summarise_ms(times) for times in cpu_ms.tolist()],
        "forwards_per_step": forwards.mean(axis=1).round(3).tolist(),
        "rounds_alike": alike.sum(axis=1).tolist(),
    }
    wall, cpu = wall_ms / wall_ms[0], cpu_ms / cpu_ms[0]
    of_alike = [each[same] for each, same in zip(cpu, alike, strict=True)]
    for name, ratios in zip(_RATIOS, (wall, cpu, of_alike), strict=True):
        told[name] = [round(float(np.median(each)), 3) if len(each) else None for each in ratios]
    return {name: dict(zip(names, values, strict=True)) for name, values in told.items()}


class _Robot:
    """One robot with `count` examples, and a decoder of its own."""

    def __init__(self, subject: Subject, count: int, is_prepared: bool):
        """is_prepared: requests are prepared before the clock starts."""
        self.count, self.num_tokens = count, 0
        self._subject, self._is_prepared = subject, is_prepared
        steering = Steering()
        steering.target = PHRASE
        self._decoder = steer_tree(TreeDecoder(subject.loaded), steering)
        self._generator = np.random.default_rng(0)
        self._examples = [self._draw_example() for _ in range(count)]

    def _draw_example(self) -> Example:
        seen = draw_observation(self._generator)
        return Example(Picture(seen.image), seen.instruction, seen.proprio, PHRASE)

    def step(self) -> tuple[float, float, int]:
        """Milliseconds of a step: on the clock, and of the processor, the better measure on a busy machine. And its
        number of forwards.
        """
        subject = self._subject
        request = subject.draw_request(self._generator, "robot", self._examples)
        ready = subject.prepare(request) if self._is_prepared else None

        def answer() -> Generation:
            prepared = ready or subject.prepare(request)
            self.num_tokens = len(prepared.input_ids)
            return self._decoder.decode([prepared])[0]

        answered, taken_ms, cpu_ms = subject.time(answer)
        return taken_ms, cpu_ms, int(answered.stats["forwards"])
