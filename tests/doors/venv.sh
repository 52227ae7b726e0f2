# Sourced by tests/run.sh --doors: makes a virtual environment (350 MB, a minute) of other harnesses' own packages when
# it is missing, and says which Python runs them. openpi-client wants numpy < 2, so it cannot live beside ours.
doors_venv=${VLM_LOCAL_DOORS_VENV:-.venv-doors}
case $doors_venv in
/*) export VLM_LOCAL_DOORS_PYTHON=$doors_venv/bin/python ;;
*) export VLM_LOCAL_DOORS_PYTHON=$PWD/$doors_venv/bin/python ;;
esac
install_doors() {
    echo "Installing openpi-client, vla-eval and inspect-robots into $doors_venv (350 MB) ..." >&2
    python3 -m venv "$doors_venv"
    "$VLM_LOCAL_DOORS_PYTHON" -m pip install --quiet --disable-pip-version-check \
        openpi-client==0.1.2 vla-eval==0.8.0 inspect-robots==0.60.0 >&2
    "$VLM_LOCAL_DOORS_PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -e . >&2
}
install_once "$doors_venv" installed "$(cksum <tests/doors/venv.sh)" install_doors
