#!/usr/bin/env bash
# Everything that needs a real GPU, in one go: bash tests/gpu.sh. docs/gpu-checklist.md says what to expect.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/venv.sh test
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU: vlm-local doctor says why"'
"$python" -m pytest tests/decoding/cuda_dry.py
mkdir -p docs/benchmarks
"$python" -m vlm_local bench decode --shape qwen2-vl-2b --rounds 100 | tee /dev/stderr |
    tail -1 >docs/benchmarks/gpu-decode-qwen2-vl-2b.json
"$python" -m vlm_local bench decode --model tiny --rounds 200 | tee /dev/stderr |
    tail -1 >docs/benchmarks/gpu-decode-tiny.json
"$python" -m vlm_local bench act --model tiny | tee /dev/stderr | tail -1 >docs/benchmarks/gpu-act-tiny.json
"$python" -m vlm_local bench report
