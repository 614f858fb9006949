# Everything below sets itself up: python >= 3.11, make and a package index are all it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without this, an environment variable or cache outside the repository could decide what is installed.
STAMP := $(VENV)/.installed

.PHONY: benchmark test test-all lint types speed golden clean

benchmark: $(STAMP)
	$(BIN)/run-benchmark

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked on a real installation: the folders at the top are one package only once installed.
types: $(STAMP)
	rm -rf build/types && $(BIN)/uv pip install -q --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p multiplicity_bench

speed: $(STAMP)
	$(BIN)/python -m multiplicity_bench.benchmark.speed

clean:
	rm -rf $(VENV) build

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "multiplicity-bench needs python >= 3.11, '$(PYTHON)' is older: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@
