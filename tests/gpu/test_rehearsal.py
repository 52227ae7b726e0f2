"""What runs on a GPU for the first time has run on a CPU before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.__main__ import find_result

ROOT = Path(__file__).parents[2]


def run(*arguments, timeout=600, **environment):
    command = ["bash", "tests/gpu.sh", *arguments]
    environment = {**os.environ, "VLM_LOCAL_PYTHON": sys.executable, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def rehearse(out, *parts):
    """Results by file name of the parts, or of all, each of which must be done."""
    ended = run("--rehearse", "--out", str(out), *parts)
    told = json.loads(ended.stdout.splitlines()[-1])
    assert ended.returncode == 0 and all(outcome.startswith("done") for outcome in told["parts"].values()), told
    results = {path.name: json.loads(path.read_text()) for path in out.iterdir()}
    assert set(results) == {f"gpu-{name}.json" for name in told["parts"]}
    assert all(each["card"] and each["benchmark"] and each["versions"] for each in results.values())
    return results


@pytest.mark.slow
def test_parts_that_are_named_are_done_and_write_their_results(tmp_path):
    results = rehearse(tmp_path, "limit-2b", "serve")
    assert set(results) == {"gpu-limit-2b.json", "gpu-serve.json"}


@pytest.mark.long
def test_every_part_is_done_and_writes_its_result(tmp_path):
    results = rehearse(tmp_path)
    assert len(results) == 10
    for name in ("values", "values-fused"):
        assert all(family["right"] for family in results[f"gpu-{name}.json"]["families"].values())
    assert results["gpu-serve.json"]["memory_given_back"]


@pytest.mark.slow
def test_a_machine_without_a_gpu_is_told_so_and_an_unknown_part_too(tmp_path):
    ended = run("--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 1 and "--rehearse needs none" in ended.stderr
    assert run("--rehearse", "nonsense").returncode == 2


def test_what_a_killed_part_printed_last_counts():
    assert find_result('noise\n{"n": 1}\n{"n": 2}\n{"n": 3') == {"n": 2}
    assert find_result("nothing\n") is None
