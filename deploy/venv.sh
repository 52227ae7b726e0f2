# Sourced from the repository's root, with extras of setup.cfg in $1 or none: makes the virtual environment when
# it is missing, installs the project when setup.cfg or setup.py changed, and sets $python.

# install_once FOLDER STAMP WANT COMMAND...: runs COMMAND, unless the file STAMP in FOLDER says that it was done for WANT.
# Others that install into FOLDER wait meanwhile. The lock is let go when the last process of the install ends, however
# that is; only the subshell holds it, so what the caller starts later does not. macOS has no flock: no lock there.
install_once() {
    local folder=$1 stamp=$1/$2 want=$3 lock=$1/install.lock
    shift 3
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then return; fi
    mkdir -p "$folder"
    (
        if command -v flock >/dev/null && ! flock -n 9; then
            echo "Another install into $folder is running; waiting for it to end ..." >&2
            flock 9 || true # where the file system has no locks
        fi
        if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ]; then exit; fi
        if [ -s "$lock" ]; then
            echo "The last install into $folder did not finish; installing again." >&2
        fi
        rm -f "$stamp"
        echo "not finished" >"$lock"
        "$@"
        echo "$want" >"$stamp"
        : >"$lock"
    ) 9>>"$lock"
}

install_project() {
    echo "Installing vlm-local$extras into $venv (a few minutes the first time) ..." >&2
    # Also where an install ended before pip was there.
    if ! "$python" -m pip install --help >/dev/null 2>&1; then python3 -m venv "$venv"; fi
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".$extras" >&2
}

venv=${VLM_LOCAL_VENV:-.venv}
python=$venv/bin/python
extras=${1:+[$1]}
if [ ! -x "$python" ]; then rm -f "$venv"/installed-*; fi # the Python that it was made with is gone
install_once "$venv" "installed-${1:-all}" "$(cat setup.cfg setup.py | cksum)" install_project
