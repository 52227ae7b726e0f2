# Sourced from the repository's root with the wanted extras in $1: makes the virtual environment when
# it is missing, installs the project when setup.cfg or setup.py changed, and sets $python.
venv=${VLM_LOCAL_VENV:-.venv}
python=$venv/bin/python
stamp=$venv/installed-$1
want=$(cat setup.cfg setup.py | cksum)
if [ ! -x "$python" ]; then
    python3 -m venv "$venv"
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    echo "Installing vlm-local[$1] into $venv (a few minutes the first time) ..." >&2
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".[$1]" >&2
    echo "$want" >"$stamp"
fi
