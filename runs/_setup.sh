# Sourced by the other scripts: makes .venv beside the repository's files and installs what is asked for, once.
# usage: setup EXTRAS   (EXTRAS like "dev" or "", of pyproject.toml)
setup() {
    local extras=${1:-} python="" candidate
    if [ ! -x .venv/bin/python ]; then
        for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3.10; do
            if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
                python=$candidate
                break
            fi
        done
        if [ -z "$python" ]; then
            echo "error: no Python 3.10 or newer found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
            exit 2
        fi
        "$python" -m venv .venv || {
            rm -rf .venv
            echo "error: cannot make .venv with $python (on Debian: apt install python3-venv)" >&2
            exit 2
        }
    fi
    local stamp
    stamp=.venv/.installed-$(cat pyproject.toml <(echo "$extras") | cksum | tr ' ' '-')
    if [ ! -f "$stamp" ]; then
        echo "installing into .venv (the first time takes a minute or two) ..."
        local index=()
        # On Linux the default wheel of torch brings several GB of CUDA; without a GPU take the CPU build
        if [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null &&
            curl -sfI -m 10 https://download.pytorch.org/whl/cpu/torch/ >/dev/null 2>&1; then
            index=(--extra-index-url https://download.pytorch.org/whl/cpu)
        fi
        .venv/bin/python -m pip install -q ${index[@]+"${index[@]}"} -e ".${extras:+[$extras]}"
        touch "$stamp"
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
