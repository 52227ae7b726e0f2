"""What this is worth on a GPU: each part in a process of its own, the most valuable first.

Run by tests/gpu.sh. A part's result is the JSON object that its last line is; it is written as soon as
it is there, and a part that fails or takes too long does not end the others.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_TOTAL_S = 460  # for all parts: a machine with a GPU is lent by the minute


@dataclass(frozen=True)
class Part:
    """module, flags: what runs. small: flags that follow in a rehearsal. limit_s: after which it is killed."""

    name: str
    limit_s: float
    module: str
    flags: str = ""
    small: str = ""


_SMALL = "--shape small --layers 1 --rounds 2"
_STATES = "--shape small-qwen3.5 --layers 4 --rounds 1"  # of the layers one keeps KV
_PARTS = (
    Part("values", 130, "tests.gpu.values", small="--requests 1 qwen2-vl paligemma2"),
    Part("limit-2b", 60, "vlm_local", "bench limit --shape qwen2-vl-2b", "--shape small --layers 1"),
    Part("decode-2b", 100, "vlm_local", "bench decode --shape qwen2-vl-2b --rounds 40", _SMALL),
    Part("values-fused", 90, "tests.gpu.values", "--fused", "--requests 1 qwen2-vl"),
    Part("profile-2b", 50, "vlm_local", "bench profile --shape qwen2-vl-2b --rounds 80", _SMALL),
    Part("rows-2b", 60, "vlm_local", "bench rows --shape qwen2-vl-2b --rounds 20", f"{_SMALL} --counts 1,4"),
    Part("serve", 60, "tests.gpu.serve", small="--requests 20"),
    Part("values-quantized", 90, "tests.gpu.values", "--quantized qwen2-vl qwen3-vl", "--requests 1"),
    Part("decode-7b", 90, "vlm_local", "bench decode --shape qwen2-vl-7b --rounds 20", _SMALL),
    Part("decode-qwen3.5", 90, "vlm_local", "bench decode --shape qwen3.5-4b --rounds 20", f"{_SMALL} {_STATES}"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu.sh", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(part.name for part in _PARTS)} [all]")
    parser.add_argument("--rehearse", action="store_true", help="with small shapes, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for gpu-PART.json")
    args = parser.parse_args()
    unknown = set(args.parts) - {part.name for part in _PARTS}
    if unknown:
        parser.error(f"there is no part {sorted(unknown)[0]!r}")
    args.out.mkdir(parents=True, exist_ok=True)
    card = describe_card(args.rehearse)
    outcomes, end = {}, time.monotonic() + _TOTAL_S
    for part in _PARTS:
        if not args.parts or part.name in args.parts:
            outcomes[part.name] = run_part(part, args.rehearse, end, args.out, card)
            print(f"--- {part.name}: {outcomes[part.name]}", file=sys.stderr, flush=True)
    print(json.dumps({"card": card, "parts": outcomes}))
    return 0 if all(outcome.startswith("done") for outcome in outcomes.values()) else 1


def describe_card(rehearses: bool) -> dict[str, str]:
    """The card's and the driver's names. Exits where there is no GPU, unless that is meant."""
    import torch

    if rehearses:
        return {"name": "none: a rehearsal on the CPU"}
    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU: `doctor` says why, and --rehearse needs none")
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    driver, _, memory = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().partition(", ")
    return {"name": torch.cuda.get_device_name(0), "memory": memory, "driver": driver, "cuda": torch.version.cuda}


def run_part(part: Part, rehearses: bool, end: float, out: Path, card: dict[str, str]) -> str:
    """Run it and write its result. Returns "done in ... s", or what went wrong."""
    flags = [*part.flags.split(), *(part.small.split() if rehearses else [])]
    # One thread: two that wait for each other on a busy machine take many times as long.
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if rehearses else {})}
    limit_s = min(part.limit_s, end - time.monotonic())
    if limit_s <= 0:
        return f"left out: all parts together may take {_TOTAL_S} s"
    start = time.monotonic()
    command = [sys.executable, "-m", part.module, *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            told, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            told, _ = process.communicate()
    print(told, file=sys.stderr, flush=True)
    how = {0: "done", -signal.SIGKILL: "killed"}.get(process.returncode, f"failed with status {process.returncode}")
    outcome = f"{how} in {time.monotonic() - start:.0f} s"
    result = find_result(told)
    if result is None:
        return f"{outcome}, no result"
    (out / f"gpu-{part.name}.json").write_text(json.dumps({**result, "card": card, "outcome": outcome}) + "\n")
    return outcome


def find_result(told: str) -> dict | None:
    """The last JSON object in what a part printed: a part that was killed may have got so far."""
    for line in reversed(told.splitlines()):
        if line.startswith("{") and line.endswith("}"):
            return json.loads(line)
    return None


if __name__ == "__main__":
    sys.exit(main())
