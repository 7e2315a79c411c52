# make demo    set up, then fine-tune the demo model and show what it learnt
# make test    set up, then run all tests
# make lint    style, types, format
# make bench   speed against this machine's peak and against XLA:CPU
# make interop add torch, transformers and peft, which some tests compare with when present
# make format  rewrite the sources in the project's format
# make clean   remove the environment and what was built

PYTHON ?= python3
VENV ?= .venv
BUILD := build/editable
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# A test file is one process's; two of them take up to 5 GB each.
PYTEST_ARGS ?= -n 2 --dist loadfile
NATIVE := $(wildcard ffi/*.cc ffi/*/*.cc ffi/*/*.h tests/cpp/*)
CPP := $(wildcard ffi/*.cc ffi/*/*.cc ffi/*/*.h tests/cpp/*.cc)
PYTHON_SOURCES := ktjax tests benchmarks scripts

.PHONY: demo test lint bench interop format clean

demo: $(VENV)/.installed
	$(BIN)/ktjax train

test: $(VENV)/.dev
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check $(PYTHON_SOURCES)
	$(BIN)/ruff format --check $(PYTHON_SOURCES)
	$(BIN)/mypy ktjax
	$(BIN)/clang-format --dry-run --Werror $(CPP)

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

interop: $(VENV)/.dev
	$(PIP) install -e '.[interop]' --no-build-isolation

format: $(VENV)/.dev
	$(BIN)/ruff check --fix $(PYTHON_SOURCES)
	$(BIN)/ruff format $(PYTHON_SOURCES)
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "ktjax needs Python 3.11 or later; this is $$($(PYTHON) -V). Set PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || \
	  { echo "Python.h is missing: install Python's headers (Debian: python3-dev)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The build tools live in the environment, so that no system package is needed and an
# edit of the native sources rebuilds only what changed.
$(VENV)/.tools: pyproject.toml | $(VENV)/bin/python
	$(PIP) install 'scikit-build-core>=0.10' 'nanobind>=3.1,<4' 'cmake>=3.25' ninja 'jaxlib>=0.10.2,<0.11.1'
	@touch $@

$(VENV)/.installed: $(VENV)/.tools pyproject.toml CMakeLists.txt $(NATIVE)
	$(PIP) install --no-build-isolation -C build-dir=$(BUILD) -C cmake.define.KTJAX_BUILD_TESTS=ON -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install --no-build-isolation -C build-dir=$(BUILD) -C cmake.define.KTJAX_BUILD_TESTS=ON -e '.[dev]'
	@touch $@
