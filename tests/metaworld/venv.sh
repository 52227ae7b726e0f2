# Sourced by tests/run.sh --metaworld: makes a virtual environment (150 MB) with Meta-World beside the project's own
# packages, which it reads where they are, so that no other test finds Meta-World installed.
metaworld_venv=${VLM_LOCAL_METAWORLD_VENV:-.venv-metaworld}
install_metaworld() {
    echo "Installing Meta-World into $metaworld_venv (150 MB) ..." >&2
    "$python" -m venv "$metaworld_venv"
    site=$("$metaworld_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/project.pth"
    "$metaworld_venv/bin/python" -m pip install --quiet --disable-pip-version-check metaworld==3.0.0 >&2
}
install_once "$metaworld_venv" installed "$(cksum <tests/metaworld/venv.sh)" install_metaworld
