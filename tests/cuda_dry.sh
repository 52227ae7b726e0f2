#!/usr/bin/env bash
# Runs the decoder's tensor work for a GPU without one, under fake tensors: bash tests/run.sh --cuda-dry.
# A virtual environment of its own, because only a CUDA build of torch knows the device (5.6 GB, once).
# Where there is a GPU, the same tests run on it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VLM_LOCAL_CUDA_VENV:-.venv-cuda}
if [ ! -f "$venv/complete" ]; then
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.14.1 "transformers>=5.23,<5.25" \
        "outlines>=1.3,<1.4" "llguidance>=1.9,<2" "lark>=1.2,<1.4" accelerate num2words pillow psutil pytest
    touch "$venv/complete"
fi
exec "$venv/bin/python" -m pytest tests/decoding/cuda_dry.py "$@"
