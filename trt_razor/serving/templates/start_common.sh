
fail() {
    printf '%s: error: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# Triton hands this path to a shell and to a Python that knows ASCII only, and hangs with others.
if ((${#python_modules[@]})) && [[ ! $here =~ ^[A-Za-z0-9_./,:=+@%~#-]+$ ]]; then
    fail "$here: Triton loads no Python models from such a path; move the repository to one of plain letters and digits, without spaces"
fi

# Where the server listens. Triton asks nobody for a password: open it to a network you trust only.
address=${ADDRESS:-127.0.0.1}
arguments=(
    --model-repository="$here"
    --http-address="$address" --http-port="${HTTP_PORT:-8000}"
    --grpc-address="$address" --grpc-port="${GRPC_PORT:-8001}"
    --metrics-address="$address" --metrics-port="${METRICS_PORT:-8002}"
    --disable-auto-complete-config
)

# Sets `server`; empty if there is no program of that name.
find_tritonserver() {
    if [[ -n ${TRITONSERVER:-} ]]; then
        [[ -f $TRITONSERVER && -x $TRITONSERVER ]] ||
            fail "\$TRITONSERVER: expected the program tritonserver, found none at '$TRITONSERVER'"
        server=$TRITONSERVER
    elif [[ -x /opt/tritonserver/bin/tritonserver ]]; then
        server=/opt/tritonserver/bin/tritonserver
    else
        server=$(command -v tritonserver) || server=
    fi
}

# The names among "$@" that $python cannot import, as the models see it: without PYTHONPATH and the
# working folder.
missing_of() {
    env -u PYTHONPATH "$python" -c '
import importlib.util, sys
sys.path = [p for p in sys.path if p]
def absent(name):
    try:
        return importlib.util.find_spec(name) is None
    except ImportError:
        return True
print(*(name for name in sys.argv[1:] if absent(name)))' "$@" || fail "$python: does not run"
}

lacks() {
    [[ -n $(missing_of "$1") ]]
}

# Sets `python`, which runs the Python models: Triton takes the first python3 of PATH.
find_python() {
    local folder missing
    if [[ -n ${TRT_RAZOR_TRITON_PYTHON:-} ]]; then
        python=$(command -v -- "$TRT_RAZOR_TRITON_PYTHON") ||
            fail "\$TRT_RAZOR_TRITON_PYTHON: expected a Python, found none at '$TRT_RAZOR_TRITON_PYTHON'"
        folder=$(cd -- "$(dirname -- "$python")" && pwd)
        python=$folder/${python##*/}
        [[ -x $folder/python3 ]] ||
            fail "$folder: expected a python3 beside ${python##*/}, for Triton takes the first of PATH; use a virtual environment"
        export PATH="$folder:$PATH"
    else
        python=$(command -v python3) || fail "python3: not found in PATH; the Python models need one"
    fi
    missing=$(missing_of "${python_modules[@]}")
    [[ -z $missing ]] ||
        fail "$python: has no ${missing// /, }; install with: $python -m pip install $python_packages"
}
