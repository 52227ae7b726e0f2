"""A user's choices about a policy, as they were made.

An option that is None comes from the checkpoint's vlm_local.json, else from DEFAULTS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vlm_local.embodiments import AUTO
from vlm_local.errors import ConfigError
from vlm_local.models import DEFAULT

DEFAULTS = {
    "model": DEFAULT,
    "quantize": "none",
    "device": "auto",
    "dtype": "auto",
    "grammar": "primitives",
    "decoder": "trie",
    "decide": "greedy",
    "temperature": 1.0,
    "posterior": "fast",
    "history": 0,
    "contrast": 0.0,
    "example_choice": "fixed",
    "frames": 0,
    "frame_every": 1,
    "frame_choice": "last",
    "think_every": 5,
    "think_tokens": 200,
    "embodiment": AUTO,
    "steps_per_phrase": 1,
    "max_batch": 8,
}


@dataclass(frozen=True)
class PolicyOptions:
    """A user's choices about a policy; one field for each policy flag of `serve --help`, None where nothing is chosen.

    model: a registry name, folder or repository; "random", "stop" or any phrase for a baseline; the
        http(s) URL of a policy server; with engine "openai" the model's name at the server.
    engine: "local" or "openai". engine_url: base URLs of the latter, joined by commas.
    embodiment: a name, a file or "auto": steps and words about the camera come from it, and what else depends on the
        robot. steps: a step table's JSON file, before the embodiment's.
    examples: "DATA" or "DATA:N", see examples.load_examples. frames, frame_every, frame_choice: as FrameSettings.
    think: a shipped file of fields by name, or a path. think_every, think_tokens: as in thinking.ThinkSettings.
    deadline_ms: from a request to its answer, None for any time.
    """

    model: str | None = None
    engine: str = "local"
    engine_url: str | None = None
    quantize: str | None = None
    device: str | None = None
    dtype: str | None = None
    grammar: str | None = None
    decoder: str | None = None
    decide: str | None = None
    temperature: float | None = None
    posterior: str | None = None
    prompt: str | None = None
    marks: str | None = None
    contrast: float | None = None
    history: int | None = None
    examples: str | None = None
    example_choice: str | None = None
    frames: int | None = None
    frame_every: int | None = None
    frame_choice: str | None = None
    think: str | None = None
    think_every: int | None = None
    think_tokens: int | None = None
    steps_per_phrase: int | None = None
    max_batch: int | None = None
    embodiment: str | None = None
    steps: str | None = None
    offline: bool = False
    deadline_ms: float | None = None


def refuse(options: PolicyOptions, unused: Sequence[str], before: str, after: str) -> None:
    """Raise ConfigError for flags that were given: they stand between `before` and `after`."""
    plain = PolicyOptions()
    given = [f"--{name.replace('_', '-')}" for name in unused if getattr(options, name) != getattr(plain, name)]
    if given:
        raise ConfigError(f"{before} {', '.join(given)}{after}".lstrip())
