"""What an answer costs in prefills: outlines, the trie, drafts, posteriors, on steps that robots take."""

import json
import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from vlm_local.assembly import PolicyOptions, find_parts
from vlm_local.bench.sequences import load_sequences
from vlm_local.errors import ConfigError
from vlm_local.provenance import describe_machine


def run(options: PolicyOptions, shape: str | None, layers: int | None, sequences: Path | None, rounds: int) -> int:
    """A model plays pictures of --sequences as it will; without pictures, and a shape always, it is
    steered to say what the sequences say. Prints a table, then one JSON object.
    """
    from vlm_local.bench.rounds import Contest, summarise_contest

    if rounds < 1 or (layers is not None and layers < 1):
        raise ConfigError("--rounds and --layers must be at least 1")
    source, episodes = load_sequences(sequences)
    start = perf_counter()
    has_pictures = all(episode.load_image for episode in episodes)
    subject, about = _build_shape(options, shape, layers) if shape else _load_model(options, steers=not has_pictures)
    load_s = perf_counter() - start
    contest = Contest(subject)
    contest.play(episodes, rounds)
    result = {
        "benchmark": "decode",
        **about,
        "sequences": source,
        "steered": subject.steers,
        **summarise_contest(contest),
        "load_s": round(load_s, 2),
        "load_average": round(os.getloadavg()[0], 1),  # above the number of cores: others were at work
        **describe_machine(),
    }
    print(f"{'x prefill':18}{'median':>9}{'mean':>9}{'p95':>9}{'forwards':>11}   n")
    for way, times in result["x_prefill"].items():
        numbers = "".join(f"{times[name]:9.2f}" for name in ("median", "mean", "p95"))
        print(f"{way:18}{numbers}{result['forwards_per_step'][way]:11.2f}   {times['n']}")
    print(json.dumps(result))
    return 0


def _build_shape(options: PolicyOptions, shape: str, layers: int | None):
    import torch

    from vlm_local.bench.rounds import Subject
    from vlm_local.bench.shapes import build_shape, prepare_for_shape

    parts = find_parts(replace(options, model="random"))
    best = {"device": "cuda:0" if torch.cuda.device_count() else "cpu", "dtype": "bfloat16"}
    device, dtype = (best[name] if parts.chosen[name] == "auto" else parts.chosen[name] for name in best)
    loaded = build_shape(shape, layers, torch.device(device), getattr(torch, dtype))
    subject = Subject(
        loaded, lambda request: prepare_for_shape(loaded, request), parts.grammar, parts.template, parts.settings, True
    )
    return subject, {"shape": shape, "layers": layers} | _describe(loaded)


def _load_model(options: PolicyOptions, steers: bool):
    from vlm_local.bench.rounds import Subject
    from vlm_local.engines.loading import load_model
    from vlm_local.engines.processing import Processing

    parts = find_parts(options)
    if parts.checkpoint is None:
        raise ConfigError("bench decode needs a model whose weights are here: --model NAME|FOLDER, or --shape")
    loaded = load_model(parts.checkpoint, *(parts.chosen[name] for name in ("quantize", "device", "dtype")))
    processing = Processing(loaded.processor, loaded.family, loaded.device, loaded.dtype)
    subject = Subject(loaded, processing.prepare, parts.grammar, parts.template, parts.settings, steers)
    trained = parts.checkpoint.sidecar.get("trained")
    about = {"model": parts.checkpoint.name, "checkpoint_sha256": parts.checkpoint.sha256, "trained": trained}
    return subject, about | _describe(loaded)


def _describe(loaded) -> dict:
    import torch

    on_gpu = loaded.device.type == "cuda"
    return {
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(loaded.device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
    }
