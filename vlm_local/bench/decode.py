"""What an answer costs in prefills: outlines, the trie, drafts, posteriors, on steps that robots take."""

import json
import os
from pathlib import Path
from time import perf_counter

from vlm_local.bench.sequences import load_sequences
from vlm_local.errors import ConfigError
from vlm_local.policy_options import PolicyOptions
from vlm_local.provenance import describe_machine


def run(options: PolicyOptions, shape: str | None, layers: int | None, sequences: Path | None, rounds: int) -> int:
    """A model plays pictures of --sequences as it will; without pictures, and a shape always, it is
    steered to say what the sequences say. Prints a table, then one JSON object.
    """
    from vlm_local.bench.rounds import Contest, summarise_contest
    from vlm_local.bench.subject import load_subject

    if rounds < 1:
        raise ConfigError("--rounds must be at least 1")
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
        **describe_machine(),
    }
    print(f"{'x prefill':18}{'median':>9}{'mean':>9}{'p95':>9}{'p50 ms':>10}{'p99 ms':>10}{'forwards':>11}   n")
    for way, times in result["x_prefill"].items():
        numbers = "".join(f"{times[name]:9.2f}" for name in ("median", "mean", "p95"))
        ms = "".join(f"{result['ms'][way][name]:10.2f}" for name in ("p50", "p99"))
        print(f"{way:18}{numbers}{ms}{result['forwards_per_step'][way]:11.2f}   {times['n']}")
    ratios = result["contrast_x_served"], result["x_prefill_read_blank"]
    print(
        "a contrast: {:.2f} x served_fast, and once an instruction {:.2f} prefills".format(
            *(r["median"] for r in ratios)
        )
    )
    print(json.dumps(result))
    return 0
