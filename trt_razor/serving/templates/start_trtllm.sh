
for ((rank = 0; rank < world_size; rank++)); do
    [[ -f $engine/rank$rank.engine ]] ||
        fail "$engine: expected rank$rank.engine, found none; is the engine mounted there? (see README.md)"
done
find_python
find_tritonserver
[[ -n $server ]] ||
    fail "tritonserver: not found (\$TRITONSERVER, /opt/tritonserver/bin, PATH); start in an image tritonserver:…-trtllm-python-py3"
backend=${TRITON_BACKENDS:-$(dirname -- "$(dirname -- "$(readlink -f -- "$server")")")/backends}
[[ -d $backend/tensorrtllm ]] ||
    fail "$backend/tensorrtllm: expected Triton's TensorRT-LLM backend, found none; start in an image tritonserver:…-trtllm-python-py3, or set TRITON_BACKENDS"
arguments+=(--backend-directory="$backend")

# Ranks need a GPU each. Hosts in MPI_ARGS: they may be elsewhere.
if [[ -z ${MPI_ARGS:-} ]] && command -v nvidia-smi >/dev/null; then
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        IFS=, read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
        gpus=${#devices[@]}
    else
        gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ') || gpus=0
    fi
    ((gpus >= world_size)) || fail "GPUs: expected $world_size, one for each rank, found $gpus"
fi

# A Razor engine's attention is a plugin, which the server must have loaded before the engine.
environment=()
if [[ -n $preload_name ]]; then
    if [[ -n ${RAZOR_PRELOAD:-} ]]; then
        preload=$RAZOR_PRELOAD
    elif [[ -n ${TRT_RAZOR_PLUGIN:-} ]]; then
        preload=$(dirname -- "$TRT_RAZOR_PLUGIN")/$preload_name
    else
        preload=$("$python" -c 'import trt_razor; print(trt_razor.__path__[0])' 2>/dev/null) ||
            fail "$preload_name: where is it? name it in \$RAZOR_PRELOAD, or install trt_razor for $python"
        preload=$preload/kernels/$preload_name
    fi
    [[ -f $preload ]] ||
        fail "$preload: not found; make it with 'make plugin TENSORRT_ROOT=…', or name it in \$RAZOR_PRELOAD"
    preload=$(cd -- "$(dirname -- "$preload")" && pwd)/${preload##*/}
    [[ $preload != *[[:space:]:]* ]] ||
        fail "$preload: LD_PRELOAD takes no path with spaces or colons; copy the folder elsewhere"
    plugin=${preload%/*}/$plugin_name
    [[ -f $plugin ]] ||
        fail "$plugin: not found; the plugins must lie beside ${preload##*/}"
    if [[ -n $plugin_sha256 ]]; then
        found=$(sha256sum <"$plugin")
        [[ ${found%% *} == "$plugin_sha256" ]] ||
            fail "$plugin: sha256: expected ${plugin_sha256:0:12}…, what the engine was built with, found ${found:0:12}…; rebuild the engine with this plugin"
    fi
    # By env(1): mpirun itself does not load it, and ranks on other machines do.
    environment=(env LD_PRELOAD="$preload${LD_PRELOAD:+:$LD_PRELOAD}" TRT_RAZOR_PLUGIN="$plugin")
fi

if ((world_size == 1)) && [[ -n ${NO_MPI:-} ]]; then
    exec "${environment[@]}" "$server" "${arguments[@]}" "$@"
fi
mpirun=${MPIRUN:-mpirun}
command -v -- "$mpirun" >/dev/null ||
    fail "$mpirun: not found; it starts one server for each rank (\$MPIRUN names another)"
read -r -a command <<<"${MPI_ARGS:-}"
command=("$mpirun" --allow-run-as-root "${command[@]}")
for ((rank = 0; rank < world_size; rank++)); do
    ((rank == 0)) || command+=(:)
    command+=(-n 1 "${environment[@]}" "$server" "${arguments[@]}")
    command+=("--backend-config=python,shm-region-prefix-name=prefix${rank}_")
    # The first rank answers; the others only compute.
    ((rank == 0)) || command+=(--model-control-mode=explicit --load-model=tensorrt_llm)
    command+=("$@")
done
exec "${command[@]}"
