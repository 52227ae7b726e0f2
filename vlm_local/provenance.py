"""What a result was made with, so that it can be made again."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import vlm_local

_PACKAGES = ("torch", "transformers", "numpy", "pillow", "outlines", "llguidance", "mujoco")


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


def _list_versions() -> dict[str, str]:
    installed = {}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


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
