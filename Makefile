# Everything sets itself up: a fresh machine needs Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-all lint types clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	# torch first and by itself: a range would also match CPU-only builds, whose operators torchvision cannot load
	$(BIN)/pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/convnext-det demo

test: lint types .venv/ready
	$(BIN)/pytest -m "not slow and not gpu"

# also the slow tests, and live comparison with birder and transformers
test-all: lint types .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,parity]'
	$(BIN)/pytest -m "not gpu"

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

clean:
	rm -rf .venv runs demo .pytest_cache .mypy_cache .ruff_cache
