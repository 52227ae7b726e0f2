"""How fast recorded steps are read and labelled, and rows scored."""

import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from vlm_local.bench import Measured
from vlm_local.data import open_episodes
from vlm_local.data.runs import RunWriter
from vlm_local.errors import DataError
from vlm_local.files import encode_json
from vlm_local.lab.offline.rows import load_rows
from vlm_local.lab.offline.scores import score_rows
from vlm_local.primitives import label_episode, list_phrases
from vlm_local.progress import track
from vlm_local.types import AXES

_EPISODES, _STEPS, _SIDE = 8, 50, 256
_ROWS, _ROWS_PER_EPISODE = 20_000, 40


def measure(path: str | None, repeats: int) -> Measured:
    """Steps a second, median and 5th percentile of `repeats` after one to warm up.

    path: a data set to read; None writes a run of 8 episodes of 50 frames of 256x256 first. `label` reads
    and labels, as the command does; `frames` decodes every frame besides. `score` starts from a file
    of 20,000 rows with probabilities and actions.
    """
    with tempfile.TemporaryDirectory() as folder:
        if path is None:
            path = str(_write_run(Path(folder) / "run"))
        rows_path = _write_rows(Path(folder) / "rows.jsonl")
        kinds = {
            "label": lambda: _time_reading(path, with_frames=False),
            "frames": lambda: _time_reading(path, with_frames=True),
            "score": lambda: _time_scoring(rows_path),
        }
        rates = [{name: take() for name, take in kinds.items()} for _ in track(range(repeats + 1), "data", "round")]
    result = {name: _summarise([rate[name] for rate in rates[1:]]) for name in kinds}
    lines = [f"{name:8}{told['steps_per_s']:10.0f} steps/s" for name, told in result.items()]
    return lines, {"benchmark": "data", **result, "rows": _ROWS}


def _summarise(rates: list[float]) -> dict[str, float]:
    return {
        "steps_per_s": float(np.median(rates)),
        "steps_per_s_p5": float(np.quantile(rates, 0.05)),
        "n": len(rates),
    }


def _time_reading(path: str, with_frames: bool) -> float:
    start, num_steps = perf_counter(), 0
    for episode in open_episodes(path):
        label_episode(episode.states)
        for step in range(len(episode)) if with_frames else ():
            episode.load_image(step)
        num_steps += len(episode)
    if not num_steps:
        raise DataError(f"{path} holds no step")
    return num_steps / (perf_counter() - start)


def _time_scoring(path: Path) -> float:
    start = perf_counter()
    score_rows(load_rows(path))
    return _ROWS / (perf_counter() - start)


def _write_run(folder: Path) -> Path:
    """Smooth pictures with a little noise, as a camera's compress."""
    random = np.random.default_rng(0)
    ramp = np.linspace(0, 200, _SIDE)[:, None, None] * np.array([1.0, 0.7, 0.4])
    writer = RunWriter(folder)
    for _ in range(_EPISODES):
        writer.start_episode("robot")
        states = np.cumsum(random.normal(0, 0.01, (_STEPS, 7)), axis=0) * [1, 1, 1, 1, 1, 1, 0]
        for step, state in enumerate(states):
            image = np.clip(ramp + random.normal(20, 3, (_SIDE, _SIDE, 3)), 0, 255).astype(np.uint8)
            line = {"robot": "robot", "step": step, "instruction": "lift the cup", "proprio": state, "action": state}
            writer.add_step(line, image)
    writer.close()
    return folder


def _write_rows(path: Path) -> Path:
    random = np.random.default_rng(0)
    phrases = list_phrases()
    with path.open("w", encoding="utf-8") as file:
        for index, (label, answer) in enumerate(random.integers(0, len(phrases), (_ROWS, 2))):
            row = {
                "episode": index // _ROWS_PER_EPISODE,
                "step": index % _ROWS_PER_EPISODE,
                "instruction": f"task {index % 7}",
                "label": phrases[label],
                "previous_label": phrases[answer],
                "phrase": phrases[label if random.random() < 0.6 else answer],
                "full_window": True,
                "probability": random.random(),
                "marginals": {axis: [0.2, 0.5, 0.3] for axis in AXES},
                "action": random.normal(size=7),
                "recorded_action": random.normal(size=7),
            }
            file.write(encode_json(row) + "\n")
    return path
