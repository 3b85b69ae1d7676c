# Two commands do everything, set-up included: `make demo` runs the main job, `make test` the tests.

PYTHON ?= python3.11
MARKERS ?= not slow and not gpu
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test style clean

demo: $(INSTALLED)
	PYTHON=$(BIN)/python examples/quickstart/run.sh

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "$(MARKERS)" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell -q 3 README.md CHANGELOG.md CONTRIBUTING.md megatron_adapt tools csrc examples tests benchmarks

$(INSTALLED): pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build runs *.egg-info megatron_adapt/*.so
