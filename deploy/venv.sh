# Sourced from the repository's root, with extras of setup.cfg in $1 or none: makes the virtual environment when
# it is missing, installs the project when setup.cfg or setup.py changed, and sets $python.
venv=${VLM_LOCAL_VENV:-.venv}
python=$venv/bin/python
extras=${1:+[$1]}
stamp=$venv/installed-${1:-all}
want=$(cat setup.cfg setup.py | cksum)
if [ ! -x "$python" ]; then
    python3 -m venv "$venv"
fi
if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
    echo "Installing vlm-local$extras into $venv (a few minutes the first time) ..." >&2
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".$extras" >&2
    echo "$want" >"$stamp"
fi
