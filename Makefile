# Everything below sets itself up: python >= 3.11, make and a package index are all it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# What is installed, and where, is decided here and not by an environment that happens to be active.
unexport VIRTUAL_ENV CONDA_PREFIX PYTHONHOME PYTHONPATH PIP_PREFIX PIP_REQUIRE_VIRTUALENV PIP_TARGET PIP_USER
unexport UV_BUILD_CONSTRAINT UV_CONSTRAINT UV_EXCLUDE UV_OVERRIDE UV_PROJECT UV_PROJECT_ENVIRONMENT UV_PYTHON
unexport UV_SYSTEM_PYTHON UV_WORKING_DIR UV_WORKING_DIRECTORY
# Two test processes share the cores of a small machine: threads of their own would only get into each other's way.
test test-all golden: export OMP_NUM_THREADS := 1

.PHONY: benchmark test test-all test-slurm lint types speed riemannian exact groups golden clean

benchmark: $(STAMP)
	$(BIN)/run-benchmark

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-all: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# A sweep on a real Slurm of one node: needs root, for Debian's slurm-wlm.
test-slurm: $(STAMP)
	tests/slurm.sh $(BIN)/python

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types are checked on a real installation: the folders at the top are one package only once installed. A build leaves
# files in build/ that a later build would pick up, so it goes before and after.
types: $(STAMP)
	rm -rf build
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --target $(VENV)/types --reinstall .
	rm -rf build
	cd $(VENV)/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p multiplicity_bench

speed: $(STAMP)
	$(BIN)/python -m multiplicity_bench.benchmark.speed

riemannian: $(STAMP)
	$(BIN)/python -m multiplicity_bench.leaderboard.riemannian

exact: $(STAMP)
	$(BIN)/python -m multiplicity_bench.benchmark.exact

groups: $(STAMP)
	$(BIN)/python -m multiplicity_bench.benchmark.groups

golden: $(STAMP)
	$(BIN)/python tests/golden/toy_run.py tests/golden/toy_run.json

clean:
	rm -rf $(VENV) build *.egg-info

# An environment that is there keeps its interpreter, unless `make PYTHON=...` asks for another: then it is made anew.
VERSION := import sys; print(sys.version_info[:2])
ifneq ($(wildcard $(BIN)/python),)
ifeq ($(origin PYTHON),file)
PYTHON := $(BIN)/python
else ifneq ($(shell $(PYTHON) -c '$(VERSION)'),$(shell $(BIN)/python -c '$(VERSION)'))
.PHONY: $(STAMP)
endif
endif

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "multiplicity-bench needs python >= 3.11: make PYTHON=python3.11, for '$(PYTHON)' is older or absent"; exit 2; }
	@test "$$($(BIN)/python -c '$(VERSION)' 2>/dev/null)" = "$$($(PYTHON) -c '$(VERSION)')" || $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 2; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --build-constraint constraints.txt --editable '.[dev]'
	@touch $@
