"""What to read of a data set, and what came of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_local.embodiments import AUTO
from vlm_local.errors import DataError, Report
from vlm_local.types import Episode


@dataclass(frozen=True)
class Selection:
    """What to read. camera, split: None for the main one, and for all; state_layout: None for what is proven.

    embodiment: a name, a file or "auto": the frame of rotations, and the layout where `state_layout` is None.
    """

    camera: str | None = None
    split: str | None = None
    state_layout: str | None = None
    embodiment: str = AUTO


@dataclass(frozen=True, eq=False)
class DataSet:
    """about: what is read, in words for reports: format, fps where it is said, camera, splits, state_layout.

    episodes: in reading order.
    """

    about: Mapping[str, Any]
    episodes: Iterator[Episode]


OpenData = Callable[[Report], Iterator[Episode]]  # opens the same episodes each time


def summarise_instructions(instructions: Sequence[str]) -> tuple[str, tuple[str, ...] | None]:
    """(instruction, step_instructions) of an Episode with these instructions, one for each step."""
    first = next(filter(None, instructions), "")
    return first, None if all(instruction == first for instruction in instructions) else tuple(instructions)


def refuse_selection(selection: Selection, source: str, *names: str) -> None:
    """Raises DataError where one of these fields is set, for a format that has no such thing."""
    for name in names:
        value = getattr(selection, name)
        if value is not None:
            raise DataError(f"{source} has no {name.replace('_', ' ')} to choose, so {value!r} cannot be read of it")
