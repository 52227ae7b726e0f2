#!/usr/bin/env bash
# One vLLM server for each GPU of this machine, on ports 8001, 8002, ...; prints the flags for the
# policy server:  bash deploy/replicas.sh Qwen/Qwen2-VL-2B-Instruct qwen2-vl
# GPUS=0,1 chooses GPUs; further arguments go to vLLM. Ctrl-C ends all of them.
set -euo pipefail
model=${1:?usage: replicas.sh HF_REPOSITORY_OR_FOLDER NAME [vLLM options]}
name=${2:?usage: replicas.sh HF_REPOSITORY_OR_FOLDER NAME [vLLM options]}
shift 2
IFS=, read -ra gpus <<<"${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, | tr -d ' ')}"
trap 'kill $(jobs -p) 2>/dev/null' EXIT
urls=()
for place in "${!gpus[@]}"; do
    port=$((8001 + place))
    CUDA_VISIBLE_DEVICES=${gpus[place]} VLLM_HOST_IP=127.0.0.1 vllm serve "$model" \
        --served-model-name "$name" --host 127.0.0.1 --port "$port" \
        --max-model-len 4096 --limit-mm-per-prompt '{"image": 1, "video": 0}' \
        --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}' "$@" &
    urls+=("http://127.0.0.1:$port")
done
echo "then: bash run_server.sh --engine openai --model $name --engine-url $(IFS=,; echo "${urls[*]}")" >&2
wait
