# Two commands: `make demo` shows the whole of it working, `make test` proves it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Remade when the dependencies change. "compat" puts this folder on the path, so that a folder of stores named cache/
# where a user works cannot stand in for the package.
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(STAMP)
	$(BIN)/ezsd demo

test: lint
	$(BIN)/pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV)
