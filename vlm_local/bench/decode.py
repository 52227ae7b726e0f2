"""What an answer costs in prefills: outlines, the trie, drafts, posteriors, on steps that robots take."""

import os
from pathlib import Path
from time import perf_counter

from vlm_local.bench import Measured
from vlm_local.bench.rounds import Contest, summarise_contest
from vlm_local.bench.sequences import load_sequences
from vlm_local.bench.subject import load_subject
from vlm_local.policy_options import PolicyOptions


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
