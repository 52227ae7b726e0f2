#!/usr/bin/env bash
# Serves a model to a robot: bash run_server.sh [--model qwen2-vl] [options of `serve`].
# VLM_LOCAL_VENV names another folder for the virtual environment than .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source deploy/venv.sh ''
exec "$python" -m vlm_local serve "$@"
