#!/usr/bin/env bash
# The tests on real TensorRT-LLM engines, inside an NGC image: tests/ngc/run.sh [pytest arguments].
# Fails if nothing could run. PYTHON: another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" - <<'CHECK'
import importlib.metadata, importlib.util, subprocess, sys

wanted = ("numpy", "packaging", "pytest", "safetensors", "torch")
absent = [name for name in wanted if importlib.util.find_spec(name) is None]
if absent:
    sys.exit(f"error: tests/ngc needs {', '.join(absent)}: python3 -m pip install {' '.join(absent)}")
for name in ("tensorrt_llm", "tensorrt", "torch", "trt-razor"):
    try:
        print(f"{name:14}{importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        print(f"{name:14}not installed")
try:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    print(subprocess.run(query, capture_output=True, text=True).stdout.strip() or "no GPU")
except OSError:
    print("no GPU: no nvidia-smi")
CHECK

TRT_RAZOR_NGC=1 exec "$python" -m pytest tests/ngc -rsP --color=no "$@"
