#!/usr/bin/env bash
# What this is worth on a GPU, in under eight minutes and without network:
#   bash tests/gpu.sh [--rehearse] [--out FOLDER] [PART ...]
# Each part writes FOLDER/gpu-PART.json as soon as it is done. docs/gpu-checklist.md says what to expect.
# VLM_LOCAL_PYTHON: the interpreter that has torch [that of .venv, made where it is missing].
# VLM_LOCAL_WHEELS: a folder of wheels for what that interpreter lacks; they go to a folder that is deleted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${VLM_LOCAL_PYTHON:-}" ]; then
    python=$VLM_LOCAL_PYTHON
else
    source deploy/venv.sh test
fi
export PYTHONPATH=$PWD
if [ -n "${VLM_LOCAL_WHEELS:-}" ]; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --target "$site" \
        "$VLM_LOCAL_WHEELS"/*.whl
    export PYTHONPATH=$PWD:$site
fi
"$python" -m tests.gpu "$@"
