# Two commands on a fresh clone: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# PyPI's Linux build of torch brings gigabytes of CUDA. Without an NVIDIA driver, PyTorch's own index of
# CPU builds is asked too; its versions (2.13.0+cpu) win over PyPI's.
ifeq ($(shell uname -s)$(shell command -v nvidia-smi),Linux)
TORCH_INDEX ?= --extra-index-url https://download.pytorch.org/whl/cpu --retries 1
endif

.PHONY: demo test arm-check clients lint format clean

demo: $(READY)
	$(BIN)/fox-edge demo

# Two processes side by side, each on processors of its own (tests/conftest.py); a file's tests stay together.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

# The exports really run on ARM, emulated; half an hour to an hour, and not part of the tests. Needs Debian or Ubuntu.
arm-check: $(READY)
	$(BIN)/python -m benchmarks.arm build/arm --results benchmarks/results/arm_check.json

# What the page and the tests of JavaScript clients need; without it those tests are skipped.
clients:
	cd runtimes/browser && npm ci --ignore-scripts --no-audit --no-fund && npm run vendor
	cd tests/clients && npm ci --ignore-scripts --no-audit --no-fund

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fox-edge needs Python 3.11 or newer, not " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV); llama-cpp-python is compiled once, which takes a few minutes."
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH_INDEX) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[onnx,gguf,executorch,serve,genai,optimum,lm-eval,ray,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) out build *.egg-info runtimes/browser/vendor runtimes/browser/node_modules tests/clients/node_modules
