# `make demo` runs the whole pipeline, `make test` tests it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Remade when the dependencies change.
STAMP := $(VENV)/.installed

.PHONY: demo test gpu-check lint clean

demo: $(STAMP)
	$(BIN)/ezsd demo

# Tests of a file share fixtures that cost seconds, so a file goes to one process whole; in the order of their names, for the
# files of few tests are the long ones, and would come last.
test: lint
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# On a machine with a GPU: the kernels against float64, then the table of benchmarks/kernel.py with its own gates. The table
# comes after a failed test too, but not without a GPU, which is 2.
# cuBLAS is deterministic only with a workspace of its own.
gpu-check: export CUBLAS_WORKSPACE_CONFIG = :4096:8
gpu-check: $(STAMP)
	$(BIN)/pytest tests/kernels/gpu_cases.py; tests=$$?; \
	[ $$tests -ne 2 ] || exit 2; \
	PYTHONPATH=. $(BIN)/python benchmarks/kernel.py && exit $$tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV)
