"""How long a step takes for several robots at once, and what each of them gains by company."""

from collections.abc import Sequence

import numpy as np

from vlm_local.bench import Measured
from vlm_local.bench.steering import Steering, steer_tree
from vlm_local.bench.subject import PHRASE, Subject, summarise_ms
from vlm_local.decoding.tree import TreeDecoder
from vlm_local.progress import track

_WARM_UP = 2


def measure(subject: Subject, counts: Sequence[int], rounds: int) -> Measured:
    """Decode a step of so many robots together, `rounds` times each, the counts in turns.

    The robots are in the middle of their episodes: the text before the image is kept, the phrase is
    the last one again, and the fast posterior is asked for, as `serve` does.
    """
    steering = Steering()
    steering.target = PHRASE
    decoder = steer_tree(TreeDecoder(subject.loaded, max_batch=max(counts)), steering)
    times_ms: dict[int, list[float]] = {count: [] for count in counts}
    generator = np.random.default_rng(0)
    for step in track(range(_WARM_UP + rounds), "rows", "round"):
        for count in counts:
            prepared = [subject.prepare(subject.draw_request(generator, str(robot))) for robot in range(count)]
            _, taken_ms, _ = subject.time(lambda prepared=prepared: decoder.decode(prepared))
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
    }
    lines = []
    for count in map(str, counts):
        times, ratio = result["ms"][count], result["times_the_first"][count]
        lines.append(f"{count:>3} rows   p50 {times['p50']:9.2f} ms   p99 {times['p99']:9.2f} ms   x{ratio:.2f}")
    return lines, result
