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

versions="3.13 3.12 3.11" # of Python that setup.cfg allows

is_allowed() {
    [[ " $versions " == *" $("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) "* ]]
}

find_python() {
    local each
    for each in python3 $(printf 'python%s ' $versions); do
        if is_allowed "$each"; then
            echo "$each"
            return
        fi
    done
    echo "vlm-local runs on Python ${versions##* } to ${versions%% *}, and finds none here: python3 is $(python3 --version 2>&1)." >&2
    echo "Install one, or let uv bring one: pip install uv && uv venv --seed --python 3.12 $venv" >&2
    return 1
}

install_project() {
    local base
    echo "Installing vlm-local$extras into $venv (a few minutes the first time) ..." >&2
    # Also where an install ended before pip was there.
    if ! "$python" -m pip install --help >/dev/null 2>&1; then
        base=$(find_python)
        "$base" -m venv "$venv"
    elif ! is_allowed "$python"; then
        echo "$venv is of $("$python" --version), and vlm-local runs on ${versions##* } to ${versions%% *}: delete $venv." >&2
        return 1
    fi
    "$python" -m pip install --quiet --disable-pip-version-check --editable ".$extras" >&2
}

venv=${VLM_LOCAL_VENV:-.venv}
python=$venv/bin/python
extras=${1:+[$1]}
if [ ! -x "$python" ]; then
    rm -f "$venv"/installed-* # the Python that it was made with is gone
    find_python >/dev/null    # before there is a folder
fi
install_once "$venv" "installed-${1:-all}" "$(cat setup.cfg setup.py | cksum)" install_project
