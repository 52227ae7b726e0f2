#!/usr/bin/env bash
# Runs the tests in the project's virtual environment: bash tests/run.sh [options of pytest].
# --slow also runs what takes over a second, as the CI does; --long also what takes minutes.
# --cuda-dry runs the GPU path's own instead, without a GPU where there is none.
# With --doors first: other harnesses' own packages against a running server.
# With --metaworld first: Meta-World's own package behind `sim` and `ceiling`.
# With --libero first: LIBERO's. With --simpler first: ManiSkill3's, which plays SIMPLER's tasks.
# With --smollm2 first: a language model with pretrained weights under the decoder.
# With --vllm first: those against a real vLLM instead, without network but for the loopback.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${1:-}" = --cuda-dry ]; then
    exec bash tests/cuda_dry.sh "${@:2}"
fi
source deploy/venv.sh test
case "${1:-}" in
--metaworld | --libero | --simpler | --smollm2)
    source tests/suite.sh "${1#--}"
    exec "$suite_python" -m pytest "tests/${1#--}" "${@:2}"
    ;;
--doors)
    source tests/suite.sh doors
    VLM_LOCAL_DOORS_PYTHON=$suite_python exec "$python" -m pytest tests/doors "${@:2}"
    ;;
--vllm)
    source tests/suite.sh vllm
    VLM_LOCAL_VLLM_PYTHON=$suite_python exec unshare --net --map-root-user sh -c 'ip link set lo up && exec "$@"' - \
        "$python" -m pytest tests/vllm -s "${@:2}"
    ;;
esac
"$python" -m ruff check .
"$python" -m ruff format --check .
# One thread in each: the models are small, and threads that wait for each other's core take many times as long.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# The tests start dozens of processes; where this is set, each would compile the whole package again.
unset PYTHONDONTWRITEBYTECODE
# Each process takes a stretch of neighbouring tests, so that what a file's tests share is mostly made once.
# Two processes more than cores: tests wait for a third of their time. Another -n comes after and counts.
workers=$("$python" -c 'import os; print(os.cpu_count() + 2)')
pytest=("$python" -m pytest -n "$workers" --dist worksteal)
case "${1:-}" in
"" | --slow | --long) ;;
*) exec "${pytest[@]}" "$@" ;; # a part of the tests
esac
# The type check takes half a minute of one core: beside the tests, which wait now and then.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$python" -m basedpyright --pythonpath "$python" >"$types" 2>&1 &
checker=$!
status=0
"${pytest[@]}" "$@" || status=$?
wait "$checker" || status=1
tail -n 40 "$types"
exit "$status"
