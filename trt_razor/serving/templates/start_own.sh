
[[ -f $engine/manifest.json ]] ||
    fail "$engine: expected the engine directory, found no manifest.json; is it mounted there? (see README.md)"
find_python
# A Python that was named and has a server of its own comes before what the machine has.
if [[ -n ${TRITONSERVER:-} || -z ${TRT_RAZOR_TRITON_PYTHON:-} ]] || lacks pytriton; then
    find_tritonserver
else
    server=
fi
if [[ -n $server ]]; then
    exec "$server" "${arguments[@]}" "$@"
fi
# The server inside the Python package nvidia-pytriton needs a place for its backends while it runs.
exec "$python" -c '
import sys
from pathlib import Path
from trt_razor.console import guarded
from trt_razor.serving.server import TritonServer, find_server

def serve(python, repository, address, http, grpc, metrics, *extra):
    server = TritonServer(
        Path(repository), find_server(Path(python)), int(http), int(grpc), int(metrics), address,
        extra=extra, inherit=True, die_with_us=True,
    )
    with server:
        try:
            return server.process.wait()
        except KeyboardInterrupt:  # Ctrl-C or SIGTERM: the end that was wanted
            pass
    return 0

sys.exit(guarded(lambda: serve(*sys.argv[1:])))' "$python" "$here" "$address" \
    "${HTTP_PORT:-8000}" "${GRPC_PORT:-8001}" "${METRICS_PORT:-8002}" --disable-auto-complete-config "$@"
