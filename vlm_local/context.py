"""The pictures that a robot's prompt shows before the present one: examples, and past frames of its episode."""

from dataclasses import asdict, dataclass
from typing import Any

from vlm_local.engines import scale_down
from vlm_local.errors import ConfigError
from vlm_local.examples import ExampleSet, Generate
from vlm_local.prompts import Example, Frame
from vlm_local.types import Observation, Picture

FRAME_CHOICES = ("first", "last", "alternate")
MAX_FRAMES = 32


@dataclass(frozen=True)
class FrameSettings:
    """num: frames that the prompt shows at most. every: control steps from one frame to the next.

    choice: of the episode's frames so taken the "first", the "last", or ("alternate") every other one, the last among
    them. Raises ConfigError for any other value.
    """

    num: int = 0
    every: int = 1
    choice: str = "last"

    def __post_init__(self):
        if not 0 <= self.num <= MAX_FRAMES:
            raise ConfigError(f"--frames must be from 0 to {MAX_FRAMES}, but is {self.num}")
        if self.every < 1:
            raise ConfigError(f"--frame-every must be at least 1, but is {self.every}")
        if self.choice not in FRAME_CHOICES:
            raise ConfigError(f"--frame-choice must be one of {', '.join(FRAME_CHOICES)}, not {self.choice!r}")


class FrameRing:
    """The past frames of one episode that may still be shown. Not thread-safe."""

    def __init__(self, settings: FrameSettings):
        self._settings = settings
        self._stride = 2 if settings.choice == "alternate" else 1
        self._last_step: int | None = None
        self._frames: list[Frame] = []

    def clear(self) -> None:
        self._frames, self._last_step = [], None

    def add(self, step: int, image) -> None:
        """image: uint8 (H, W, 3), what was seen at `step`; kept if it is the turn of a frame."""
        settings = self._settings
        if not settings.num or (self._last_step is not None and step < self._last_step + settings.every):
            return
        self._last_step = step
        limit = self._stride * settings.num
        if settings.choice == "first" and len(self._frames) == limit:
            return
        self._frames = [*self._frames, Frame(step, Picture(scale_down(image).copy()))][-limit:]

    def list(self) -> tuple[Frame, ...]:
        """Those that are shown, oldest first."""
        return tuple(self._frames[::-1][:: self._stride][::-1])


class PromptContext:
    """One robot's: what is shown in the present episode. Not thread-safe."""

    def __init__(self, examples: ExampleSet | None = None, frames: FrameSettings = FrameSettings()):
        self._set, self._settings = examples, frames
        self._ring = FrameRing(frames)
        self._examples: tuple[Example, ...] | None = None  # None before they are chosen

    def clear(self) -> None:
        """An episode begins."""
        self._examples = None
        self._ring.clear()

    def look(
        self, observation: Observation, generate: Generate, episode: str | None
    ) -> tuple[tuple[Example, ...], tuple[Frame, ...]]:
        """Examples and past frames for this step, whose own picture is a past frame from now on.

        generate: asks the engine for image features. episode: key of the present one.
        """
        if self._examples is None:
            self._examples = self._set.choose(observation, generate, episode) if self._set else ()
        frames = self._ring.list()
        self._ring.add(observation.step, observation.image)
        return self._examples, frames

    def describe(self, examples: tuple[Example, ...], frames: tuple[Frame, ...]) -> dict[str, Any]:
        """For the record of a step: what its prompt showed; nothing where nothing can be shown."""
        told: dict[str, Any] = {}
        if self._set is not None:
            told["examples"] = [f"{example.source}: {example.phrase}" for example in examples]
        if self._settings.num:
            told["frames"] = [frame.step for frame in frames]
        return told


def describe_context(examples: ExampleSet | None, frames: FrameSettings) -> dict[str, Any]:
    """For the policy's metadata: what is shown, beside the present picture; nothing where nothing is."""
    told = {} if examples is None else {"examples": examples.metadata}
    return told | ({"frames": asdict(frames)} if frames.num else {})
