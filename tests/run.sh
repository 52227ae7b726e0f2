#!/usr/bin/env bash
# Runs the tests in the project's virtual environment: bash tests/run.sh [options of pytest].
# --cuda-dry runs the GPU path's own instead, without a GPU where there is none.
# With --vllm first: those against a real vLLM instead, without network but for the loopback.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --cuda-dry ]; then
    exec bash tests/cuda_dry.sh "${@:2}"
fi
source deploy/venv.sh test
if [ "${1:-}" = --vllm ]; then
    shift
    source tests/vllm/venv.sh
    exec unshare --net --map-root-user sh -c 'ip link set lo up && exec "$@"' - \
        "$python" -m pytest tests/vllm -s "$@"
fi
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest "$@"
