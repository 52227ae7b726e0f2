"""Observation (and the episode's last phrases) -> what the model reads. No tensors.

A template is a text file with the lines `[before]` and `[after]`: what stands before and after the
image. `$name` is filled in; the names are in `build_prompt`. Text that stays the same in an episode
belongs before the image, where its KV can be kept between steps.

Between the two there may be blocks for what comes before the present picture, in this order: `[example]`, once for
each example, `[reasoning]`, what the model wrote about an earlier step, `[frame]`, once for each past frame, and
`[now]`, the text before the present picture where any of these is shown. `$picture` says where a picture stands.
"""

import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from vlm_local.embodiments import BRIDGE, CAMERA_WORDS, load_embodiment
from vlm_local.errors import ConfigError, suggest
from vlm_local.types import Observation, Picture, Prompt, Thought

_FOLDER = Path(__file__).resolve().parent
_UNMEASURED = "not measured"
_NUMBERS = ("x_cm", "y_cm", "z_cm", "x_mm", "y_mm", "z_mm", "roll_deg", "pitch_deg", "yaw_deg", "gripper_percent")
_CAMERA = tuple(f"camera_{word}" for word in CAMERA_WORDS)
_SLIGHTLY = 'Begin with "slightly" for a small movement, where little is missing: "slightly move left, tilt down".'
_STATE = ("proprio", *_NUMBERS)
# Of each block, in the order of the file: what it may use.
_NAMES = {
    "before": ("instruction", "history", "slightly", *_STATE, *_CAMERA),
    "example": ("picture", "instruction", "phrase", *_STATE, *_CAMERA),
    "reasoning": ("reasoning", "step", "instruction", *_CAMERA),
    "frame": ("picture", "step", "instruction", *_CAMERA),
    "now": ("instruction", *_CAMERA),
    "after": ("instruction", "history", "slightly", *_STATE, *_CAMERA),
}
_BLOCK = re.compile(rf"^\[({'|'.join(_NAMES)})\]\n", re.MULTILINE)


@dataclass(frozen=True, eq=False)
class Example:
    """A step of a recorded episode: what the robot saw and felt, and the phrase that was right.

    proprio: float64 (7,) as in Observation. source: where it is from, for records.
    """

    picture: Picture
    instruction: str
    proprio: np.ndarray | None
    phrase: str
    source: str = ""


@dataclass(frozen=True, eq=False)
class Frame:
    """What the robot saw at an earlier step of its episode."""

    step: int
    picture: Picture


@dataclass(frozen=True)
class Reasoning:
    """What the model wrote at an earlier step of the episode."""

    step: int
    thought: Thought


@dataclass(frozen=True)
class Template:
    """before, after: string.Template texts around the image. sha256: of the file. camera: its words by name, and what
    is said of "slightly".

    example, frame: texts around an earlier picture, None where the file has no such block. reasoning: around what was
    written at an earlier step, or None. now: before the present picture.
    """

    name: str
    before: string.Template
    after: string.Template
    sha256: str
    camera: Mapping[str, str] = field(default_factory=dict)
    example: tuple[string.Template, string.Template] | None = None
    frame: tuple[string.Template, string.Template] | None = None
    now: string.Template | None = None
    reasoning: string.Template | None = None


def load_template(name: str | Path, camera: Mapping[str, str] | None = None, has_slightly: bool = False) -> Template:
    """A shipped template by name ("chat", "paligemma") or the user's own file by path.

    camera: what an embodiment says of the picture, None for Bridge's camera. has_slightly: the grammar has that word.
    """
    path = Path(name) if "." in str(name) else _FOLDER / f"{name}.txt"
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        shipped = sorted(file.stem for file in _FOLDER.glob("*.txt"))
        raise ConfigError(
            f"prompt {name}: cannot read {path} ({error}){suggest(path.stem, shipped)}; the shipped prompts are "
            f"{', '.join(shipped)}"
        ) from None
    blocks = _read_blocks(text, path)
    told = load_embodiment(BRIDGE).camera if camera is None else camera
    words = {f"camera_{word}": text for word, text in told.items()} | {"slightly": _SLIGHTLY if has_slightly else ""}
    return Template(
        path.stem,
        blocks["before"],
        blocks["after"],
        hashlib.sha256(data).hexdigest(),
        words,
        example=_split_at_picture(blocks.get("example"), "example", path),
        frame=_split_at_picture(blocks.get("frame"), "frame", path),
        now=blocks.get("now"),
        reasoning=blocks.get("reasoning"),
    )


def _read_blocks(text: str, path: Path) -> dict[str, string.Template]:
    """The blocks of a file by name. Raises ConfigError for a file that is no template; path: of it, for that."""
    head, *found = _BLOCK.split(text)
    names, texts = found[::2], dict(zip(found[::2], found[1::2], strict=True))
    if head.strip() or not {"before", "after"} <= set(names):
        raise ConfigError(f"{path}: a prompt is a line [before], text, a line [after], text; one of the two is missing")
    if names != [name for name in _NAMES if name in texts]:
        raise ConfigError(
            f"{path}: expected each block once and in the order {', '.join(f'[{name}]' for name in _NAMES)}"
        )
    blocks = {name: parse_block(name, text, path) for name, text in texts.items()}
    if "reasoning" in blocks and "reasoning" not in blocks["reasoning"].get_identifiers():
        raise ConfigError(f"{path}: [reasoning] must hold $reasoning, where the model's words stand")
    if "instruction" not in _list_names(blocks["before"], blocks["after"]):
        raise ConfigError(f"{path}: the prompt never shows the instruction; write $instruction where it belongs")
    return blocks


def _list_names(*blocks: string.Template) -> set[str]:
    """What is filled in."""
    return {name for block in blocks for name in block.get_identifiers()}


def check_history(history: int | None, template: Template) -> None:
    """history: as it was asked for. Raises ConfigError where the template would not show it."""
    if history and "history" not in _list_names(template.before, template.after):
        raise ConfigError(f"--history would change nothing: the prompt {template.name!r} does not show $history")


def parse_block(block: str, text: str, path: Path) -> string.Template:
    """A template's text. block: whose names it may use. Raises ConfigError for others; path: of the file, for that."""
    # A trailing space or newline would break the canonical tokenisation of every phrase.
    template, names = string.Template(text.strip()), _NAMES[block]
    places = list(template.pattern.finditer(template.template))
    unknown = {place["named"] or place["braced"] or "$" for place in places if place["escaped"] is None} - set(names)
    if unknown:
        where = "a prompt" if block in ("before", "after") else f"[{block}]"
        raise ConfigError(f"{path}: unknown {', '.join(sorted(unknown))}; {where} may use ${', $'.join(names)}, and $$")
    return template


def _split_at_picture(
    block: string.Template | None, name: str, path: Path
) -> tuple[string.Template, string.Template] | None:
    if block is None:
        return None
    places = block.pattern.finditer(block.template)
    spans = [place.span() for place in places if "picture" in (place["named"], place["braced"])]
    if len(spans) != 1:
        raise ConfigError(f"{path}: [{name}] must hold $picture once, where its picture stands")
    ((start, end),) = spans
    return string.Template(block.template[:start]), string.Template(block.template[end:])


def build_prompt(
    template: Template,
    observation: Observation,
    history: Sequence[str] = (),
    examples: Sequence[Example] = (),
    frames: Sequence[Frame] = (),
    reasoning: Reasoning | None = None,
) -> Prompt:
    """Fill in: the instruction; `history`, phrases, oldest first, as a sentence, empty without any;
    the words of the template's camera, and of "slightly" where the grammar has it; the measured state as a
    sentence and as whole numbers (cm, mm, degrees, percent of the gripper's range), "not measured" without proprio.

    examples, frames: in the order in which they are shown; reasoning stands between the two: it changes less often
    than frames do. Raises ConfigError where the template has no such block.
    """
    values = {
        "instruction": _join_words(observation.instruction),
        "history": f"The last movements, oldest first: {'; '.join(history)}." if history else "",
        **_describe_proprio(observation.proprio),
        **template.camera,
    }
    earlier: list[str | Picture] = []
    for example in examples:
        own = {"instruction": _join_words(example.instruction), "phrase": example.phrase}
        told = {**values, **_describe_proprio(example.proprio), **own}
        earlier += _surround(example.picture, "example", template, told)
    if reasoning is not None:
        earlier.append(_show_reasoning(reasoning, template, values))
    for frame in frames:
        earlier += _surround(frame.picture, "frame", template, {**values, "step": str(frame.step)})
    if earlier and template.now is not None:
        earlier.append(_tidy(template.now.substitute(values)))
    before, after = _tidy(template.before.substitute(values)), _tidy(template.after.substitute(values))
    return Prompt(before, after, tuple(part for part in earlier if part != ""))


def _show_reasoning(reasoning: Reasoning, template: Template, values: Mapping[str, str]) -> str:
    if template.reasoning is None:
        raise ConfigError(f"the prompt {template.name} shows no reasoning: it has no block [reasoning]")
    told = {"reasoning": reasoning.thought.text, "step": str(reasoning.step)}
    return _tidy(template.reasoning.substitute({**values, **told}))


def _surround(picture: Picture, name: str, template: Template, values: Mapping[str, str]) -> list[str | Picture]:
    """A picture between the texts of its block."""
    block = getattr(template, name)
    if block is None:
        raise ConfigError(f"the prompt {template.name} shows one picture only: it has no block [{name}]")
    lead, tail = (_tidy(text.substitute(values)) for text in block)
    return [lead, picture, tail]


def _join_words(text: str) -> str:
    return " ".join(text.split())


def _tidy(text: str) -> str:
    """Without the spaces that an empty value leaves; one at the end would change every phrase's tokens."""
    return re.sub(" +", " ", text).replace(" \n", "\n").strip()


def _describe_proprio(proprio: np.ndarray | None) -> dict[str, str]:
    if proprio is None:
        return {"proprio": "The position of the gripper is not measured."} | dict.fromkeys(_NUMBERS, _UNMEASURED)
    scaled = np.concatenate([100 * proprio[:3], 1000 * proprio[:3], np.degrees(proprio[3:6]), 100 * proprio[6:]])
    numbers = [int(value) for value in np.rint(scaled)]
    x, y, z, *_, roll, pitch, yaw, gripper = numbers
    words = (
        f"The gripper is {x} cm in front of the robot's base, {abs(y)} cm to the {'right' if y < 0 else 'left'} of it "
        f"and {z} cm high; roll {roll}, pitch {pitch}, yaw {yaw} degrees; it is {gripper} percent open."
    )
    return {"proprio": words} | dict(zip(_NUMBERS, map(str, numbers), strict=True))
