"""What this machine has: versions, memory, GPUs; which models fit and how fast; the mend for what is missing."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

from vlm_local.errors import ConfigError
from vlm_local.files import measure_free_disk
from vlm_local.models import find_checkpoint, find_local
from vlm_local.registry import DEFAULT, MODELS, Model
from vlm_local.weights import estimate_memory

# A 256x256 picture, what follows it in the prompt and the draft: the text before it is kept. 76 to
# 107 text tokens, 64 to 256 image tokens, 32 of the draft; rounded to the middle.
TOKENS_PER_STEP = 250

SPARE = 1.1  # what a model takes beside its weights: activations, the cache of a prompt
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Finding:
    """verdict: "ok", "warn" or "FAIL"; text says what to do about the last two."""

    verdict: str
    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.verdict:4}  {self.name:28}  {self.text}"


def measure_free_memory(device: str) -> int:
    """Free bytes for a model on "cpu" or "cuda:N"; on the CPU within the container's limit."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    free = psutil.virtual_memory().available
    try:  # cgroup v2; "max" where there is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def describe_device() -> str:
    """The device of --device auto: "cuda:0, NVIDIA H100", "cpu, 16 cores", or why torch cannot say."""
    try:
        import torch
    except ImportError as error:
        return f"unknown: torch cannot be imported ({error})"
    if torch.cuda.is_available():
        return f"cuda:0, {torch.cuda.get_device_name(0)}"
    return f"cpu, {os.cpu_count()} cores"


def has_fast_bfloat16(device: str) -> bool:
    """Whether matrices in bfloat16 are the faster ones: on GPUs from sm_80 on and on CPUs with AMX.

    On a CPU with AVX512_BF16 but no AMX, float32 did 250 x 1536 by 1536 x 8960 1.6 times as fast.
    """
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def examine() -> Iterator[Finding]:
    """Findings about this machine, as they are made; takes a few seconds."""
    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}")
    yield from (_check_package(name, mend) for name, mend in _PACKAGES)
    device = "cpu"
    for finding, found in _check_gpus():
        device = found or device
        yield finding
    yield _check_memory()
    yield _check_disk()
    yield _check_embedded()
    speeds = {name: _measure_rates(device, name) for name in ("bfloat16", "float32")}
    told = "; ".join(f"{name} {rates.operations_per_s / 1e12:.2g} TFLOP/s" for name, rates in speeds.items())
    yield Finding(
        "ok", "speed", f"{told}; {speeds['float32'].bytes_per_s / 1e9:.2g} GB/s from memory; measured on {device}"
    )
    for model in MODELS:
        if model.repository:
            yield _describe_fit(model, speeds, device)


_NAMES = ("torch", "transformers", "outlines", "bitsandbytes", "num2words", "mujoco", "trossen-arm-sim", "pyarrow")
_PACKAGES = tuple((name, ".venv/bin/pip install -e .") for name in _NAMES)


@dataclass(frozen=True)
class DeviceRates:
    """What a device was measured to do in a second: bytes read or copied, operations of a matrix product."""

    bytes_per_s: float
    operations_per_s: float

    def find_least_ms(self, num_weights: int, num_bytes: float, num_tokens: int) -> float:
        """The least milliseconds of a forward over `num_tokens`, of which each meets every weight.

        The larger of two: all weights read once, and two operations a weight and token. A computed figure: attention
        (below 3 % up to 1,000 tokens), pictures' preparation and everything but matrices come on top.
        """
        return 1e3 * max(num_bytes / self.bytes_per_s, 2 * num_weights * num_tokens / self.operations_per_s)


def _check_package(name: str, mend: str) -> Finding:
    try:
        return Finding("ok", name, version(name))
    except PackageNotFoundError:
        return Finding("FAIL", name, f"not installed: {mend}")


def _check_gpus() -> Iterator[tuple[Finding, str | None]]:
    """Findings, each with the device that a model would be put on."""
    try:
        import torch
    except ImportError as error:
        yield Finding("FAIL", "gpu", f"torch cannot be imported: {error}"), None
        return
    drivers = _ask_driver()
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        text = f"{torch.cuda.get_device_name(index)}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, sm_{major}{minor}"
        driver = f", driver {drivers[0].split(', ')[-1]}, torch's CUDA {torch.version.cuda}" if drivers else ""
        slow = "" if major >= 8 else "; no bfloat16: float32 is used, or --dtype float16 at your risk"
        yield Finding("warn" if slow else "ok", f"cuda:{index}", text + driver + slow), "cuda:0"
    if torch.cuda.device_count():
        return
    if not drivers:
        yield Finding("warn", "gpu", "none (nvidia-smi finds no GPU); models run on the CPU"), None
    elif torch.version.cuda is None:
        mend = ".venv/bin/pip install --force-reinstall torch==2.13.0 from an index with CUDA builds"
        yield Finding("FAIL", "gpu", f"{drivers[0]} is there, but torch is a CPU build: {mend}"), None
    else:
        mend = f"the driver may be older than torch's CUDA {torch.version.cuda}: update it, or restart the machine"
        yield Finding("FAIL", "gpu", f"{drivers[0]} is there, but torch cannot use it; {mend}"), None


def _ask_driver() -> list[str]:
    """A line "name, driver version" for each GPU that the NVIDIA driver knows."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def _check_memory() -> Finding:
    import psutil

    free, total = measure_free_memory("cpu"), psutil.virtual_memory().total
    return Finding("ok", "memory", f"{free / 1e9:.1f} GB free of {total / 1e9:.1f} GB")


def _check_disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    free = measure_free_disk(cache)
    text = f"{free / 1e9:.0f} GB free for models in {cache}"
    if free < 5e9:
        return Finding("warn", "disk", f"{text}; name another folder in HF_HOME, or make room")
    return Finding("ok", "disk", text)


def _check_embedded() -> Finding:
    try:
        checkpoint = find_checkpoint(DEFAULT, offline=True)
    except ConfigError as error:
        return Finding("FAIL", "embedded checkpoint", str(error))
    if not checkpoint.sidecar.get("trained"):
        return Finding("warn", "embedded checkpoint", f"{checkpoint.folder}, untrained: its answers mean nothing")
    return Finding("ok", "embedded checkpoint", f"{checkpoint.folder}, trained")


def _measure_rates(device: str, dtype: str) -> DeviceRates:
    """Best of a few runs, a second on the CPU."""
    import torch

    layer = torch.nn.Linear(2048, 8192, bias=False, dtype=getattr(torch, dtype), device=device)
    tokens = torch.randn(TOKENS_PER_STEP, 2048, dtype=layer.weight.dtype, device=device)
    large = torch.zeros(1 << (24 if device == "cpu" else 27), dtype=torch.int64, device=device)

    @torch.inference_mode()
    def time_best(work) -> float:
        times = []
        for _ in range(5):
            start = perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize(device)
            times.append(perf_counter() - start)
        return min(times)

    operations = 2 * TOKENS_PER_STEP * layer.weight.numel() / time_best(lambda: layer(tokens))
    return DeviceRates(8 * large.numel() / time_best(large.sum), operations)


def _describe_fit(model: Model, speeds: Mapping[str, DeviceRates], device: str) -> Finding:
    present = "present" if find_local(model.name) else f"`fetch {model.name}` gets {model.download_bytes / 1e9:.1f} GB"
    ways = [(quantize, "bfloat16") for quantize in model.quantizations]
    if not has_fast_bfloat16(device):
        ways.insert(0, ("none", "float32"))
    free = measure_free_memory(device)
    for quantize, dtype in ways:
        weights = estimate_memory(model.linear, model.rest, quantize, 4 if dtype == "float32" else 2)
        if SPARE * weights <= free:
            rate = 1e3 / speeds[dtype].find_least_ms(model.linear, weights, TOKENS_PER_STEP)
            how = dtype if quantize == "none" else f"--quantize {quantize}"
            text = f"fits {device} in {how}: {SPARE * weights / 1e9:.1f} GB, by calculation at most {rate:.2g} steps/s"
            return Finding("ok", model.name, f"{text}; {present}")
    least = model.quantizations[-1]
    need, how = SPARE * model.estimate_memory(least) / 1e9, "bfloat16" if least == "none" else least
    return Finding("warn", model.name, f"does not fit {device}: {how} needs {need:.1f} GB, {free / 1e9:.1f} are free")
