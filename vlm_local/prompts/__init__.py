"""Observation (and the episode's last phrases) -> what the model reads. No tensors.

A template is a text file with the lines `[before]` and `[after]`: what stands before and after the
image. `$name` is filled in; the names are in `build_prompt`. Text that stays the same in an episode
belongs before the image, where its KV can be kept between steps.
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
from vlm_local.types import Observation, Prompt

_FOLDER = Path(__file__).resolve().parent
_UNMEASURED = "not measured"
_NUMBERS = ("x_cm", "y_cm", "z_cm", "x_mm", "y_mm", "z_mm", "roll_deg", "pitch_deg", "yaw_deg", "gripper_percent")
_CAMERA = tuple(f"camera_{word}" for word in CAMERA_WORDS)
_SLIGHTLY = 'Begin with "slightly" for a small movement, where little is missing: "slightly move left, tilt down".'
_NAMES = ("instruction", "history", "proprio", "slightly", *_NUMBERS, *_CAMERA)


@dataclass(frozen=True)
class Template:
    """before, after: string.Template texts around the image. sha256: of the file. camera: its words by name, and what
    is said of "slightly".
    """

    name: str
    before: string.Template
    after: string.Template
    sha256: str
    camera: Mapping[str, str] = field(default_factory=dict)


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
    head, before_mark, rest = text.partition("[before]\n")
    before, after_mark, after = rest.partition("[after]\n")
    if head.strip() or not before_mark or not after_mark:
        raise ConfigError(f"{path}: a prompt is a line [before], text, a line [after], text; one of the two is missing")
    told = load_embodiment(BRIDGE).camera if camera is None else camera
    words = {f"camera_{word}": text for word, text in told.items()} | {"slightly": _SLIGHTLY if has_slightly else ""}
    template = Template(path.stem, _parse(before, path), _parse(after, path), hashlib.sha256(data).hexdigest(), words)
    if "$instruction" not in before + after and "${instruction}" not in before + after:
        raise ConfigError(f"{path}: the prompt never shows the instruction; write $instruction where it belongs")
    return template


def _parse(text: str, path: Path) -> string.Template:
    # A trailing space or newline would break the canonical tokenisation of every phrase.
    template = string.Template(text.strip())
    places = list(template.pattern.finditer(template.template))  # Template says them itself from Python 3.11 on
    unknown = {place["named"] or place["braced"] or "$" for place in places if place["escaped"] is None} - set(_NAMES)
    if unknown:
        raise ConfigError(
            f"{path}: unknown {', '.join(sorted(unknown))}; a prompt may use ${', $'.join(_NAMES)}, and $$"
        )
    return template


def build_prompt(template: Template, observation: Observation, history: Sequence[str] = ()) -> Prompt:
    """Fill in: the instruction; `history`, phrases, oldest first, as a sentence, empty without any;
    the words of the template's camera, and of "slightly" where the grammar has it; the measured state as a
    sentence and as whole numbers (cm, mm, degrees, percent of the gripper's range), "not measured" without proprio.
    """
    values = {
        "instruction": " ".join(observation.instruction.split()),
        "history": f"The last movements, oldest first: {'; '.join(history)}." if history else "",
        **_describe_proprio(observation.proprio),
        **template.camera,
    }
    return Prompt(_tidy(template.before.substitute(values)), _tidy(template.after.substitute(values)), template.name)


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
