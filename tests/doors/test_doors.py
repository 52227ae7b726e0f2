"""Other harnesses' own, unmodified packages drive a running server: `bash tests/run.sh --doors`."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PYTHON = os.environ.get("VLM_LOCAL_DOORS_PYTHON")

pytestmark = pytest.mark.skipif(PYTHON is None, reason="needs other harnesses' packages: bash tests/run.sh --doors")

OPENPI = """
import json, sys
import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy

policy = WebsocketClientPolicy(sys.argv[1])
image = np.zeros((224, 224, 3), np.uint8)
observation = {"observation/image": image, "observation/wrist_image": image, "observation/state": np.zeros(8)}
observation["prompt"] = "reach the red carrot block"
answer = policy.infer(observation)
broker = ActionChunkBroker(policy, action_horizon=5)
rows = [broker.infer(observation)["actions"] for _ in range(7)]
try:
    policy.infer({"prompt": "nothing to see"})
except RuntimeError as error:
    refusal = str(error)
print(json.dumps({
    "model": policy.get_server_metadata()["model"], "shape": answer["actions"].shape, "phrases": answer["phrases"],
    "rows": [row.shape for row in rows], "refusal": refusal,
}))
"""


@pytest.fixture(scope="module", params=["tiny", "move up"])
def served(request, tmp_path_factory):
    """(model, HTTP URL, websocket URL)."""
    command = [sys.executable, "-m", "vlm_local", "serve", "--model", request.param, "--port", "0", "--record", "off"]
    with subprocess.Popen(
        [*command, "--websocket-port", "0", "--horizon", "5"], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            http = re.search(r"http://[0-9.:]+", next(line for line in server.stdout if line.startswith("ready")))[0]
            yield request.param, http, next(server.stdout).split()[1]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def run(*command, **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_openpi_client_plays_chunks(served):
    model, _, url = served
    told = json.loads(run(PYTHON, "-c", OPENPI, url).splitlines()[-1])
    assert told["model"] == model and told["shape"] == [5, 7] and told["rows"] == [[7]] * 7
    assert len(set(told["phrases"])) == 1 and "no picture came" in told["refusal"]


def test_vla_evals_own_runner_plays_episodes(served, tmp_path):
    model, _, url = served
    config = tmp_path / "eval.yaml"
    config.write_text(f"""
server: {{url: "{url}vla-eval"}}
output_dir: {tmp_path}/out
benchmarks:
  - {{benchmark: "vla_eval_point:PointBenchmark", name: point, mode: sync, episodes_per_task: 3, max_steps: 12}}
""")
    program = Path(PYTHON).with_name("vla-eval")
    run(program, "run", "-c", config, "--no-docker", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").rglob("*.json")]
    (task,) = next(found["tasks"] for found in results if "tasks" in found)
    assert len(task["episodes"]) == 3 and not any(episode.get("failure_reason") for episode in task["episodes"])
    if model == "move up":
        assert task["mean_success"] == 1.0


def test_inspect_robots_finds_and_runs_the_policy(served, tmp_path):
    model, url, _ = served
    assert "vlm-local" in run(Path(PYTHON).with_name("inspect-robots"), "list", "policies")
    script = HERE / "inspect_point.py"
    told = json.loads(run(PYTHON, script, url, tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)}).splitlines()[-1])
    assert told["issues"] == [] and told["status"] == "success" and told["said"]
    assert all(step["fault"] is None for step in told["said"])
    if model == "move up":
        assert len(told["said"]) == 4, "0.0125 m a step"
