# Sourced by tests/run.sh --simpler: makes a virtual environment (1 GB) with ManiSkill3 beside the project's own packages,
# which it reads where they are, so that no other test finds ManiSkill3 installed.
simpler_venv=${VLM_LOCAL_SIMPLER_VENV:-.venv-simpler}
install_simpler() {
    echo "Installing ManiSkill3 into $simpler_venv (1 GB) ..." >&2
    "$python" -m venv "$simpler_venv"
    site=$("$simpler_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/project.pth"
    "$simpler_venv/bin/python" -m pip install --quiet --disable-pip-version-check mani_skill==3.0.1 >&2
}
install_once "$simpler_venv" installed "$(cksum <tests/simpler/venv.sh)" install_simpler
