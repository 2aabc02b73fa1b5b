# `make demo` runs the whole pipeline, `make test` tests it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS := $(VENV)-docs
# Remade when the dependencies change.
STAMP := $(VENV)/.installed

.PHONY: demo test test-long docs faults fuzz gpu-check lint style clean

demo: $(STAMP)
	$(BIN)/ezsd demo

# One process more than cores, as tests of killed and stopped processes wait; four at most, each takes a gigabyte.
PROCESSES := $(shell $(PYTHON) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
# Tests of a file share fixtures that cost seconds, so a file goes to one process whole; in the order of their names, for the
# files of few tests are the long ones, and would come last. Pytest keeps its form of the tests as bytecode for the next time.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder
# Where Python writes no bytecode by itself (PYTHONDONTWRITEBYTECODE), each of hundreds of processes would compile what it loads.
COMPILE := $(BIN)/python -m compileall -q ezsd cache pipeline cli.py tests

# Without its cache mypy keeps one core busy for most of a minute, so it runs beside the tests and is heard after them.
define TEST
	$(COMPILE)
	$(BIN)/mypy > $(VENV)/types.txt 2>&1 & types=$$!; \
	$(PYTEST) $(1); tests=$$?; wait $$types; types=$$?; cat $(VENV)/types.txt; exit $$((tests + types))
endef

test: style
	$(call TEST)

# Tests marked slow too: more variants, more mutations and full sizes of what `make test` runs in small.
test-long: style
	$(call TEST,-m "slow or not slow")

# The long form of tests/faults, tens of minutes; another call goes on. FAULTS: options, see docs/faults.md.
faults: $(STAMP)
	PYTHONPATH=. $(BIN)/python benchmarks/faults.py $(FAULTS)

# The long form of tests/fuzz, half an hour for each kind of file; another call goes on. FUZZ: options, see SECURITY.md. Its
# fuzzer has wheels for Linux alone, and is installed here, where it is needed.
fuzz: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[fuzz]"
	PYTHONPATH=. $(BIN)/python benchmarks/fuzz.py --work $(VENV)/fuzz $(FUZZ)

# The pages of docs/ as a site in build/site; stops at a page without a place, a broken link or anchor. In an environment of its
# own, without torch.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --clean

$(DOCS)/.installed: docs/requirements.txt constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --constraint constraints.txt --requirement docs/requirements.txt
	touch $@

# Accepts or refuses a machine with a GPU, in its last line; "Error 1" is refused, "Error 2" is no GPU.
gpu-check: $(STAMP)
	PYTHONPATH=. $(BIN)/python benchmarks/gpu_check.py

lint: style
	$(BIN)/mypy

style: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) $(DOCS) build/site
