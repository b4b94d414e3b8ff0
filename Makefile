# Everything sets itself up: a fresh machine needs Python 3.11 or later and make.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo bench check test pytest test-all test-oldest test-xla lint types docs notebooks clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	# torch first and by itself: a range would also match CPU-only builds, whose operators torchvision cannot load
	# of 18,000 files most are never imported, so Python compiles those that are
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/convnext-det demo

# the inner loop, under 90 seconds on two cores; tests that take more than half a second are marked "heavy", and the
# slowest of the others are printed: mark those that have grown, by what they take on an idle machine
check: lint types .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal --durations=5 -m "not heavy and not slow and not gpu and not xla"

# lint and types beside the tests, which leave a tenth of two cores idle
test: .venv/ready
	$(MAKE) --jobs=2 lint types pytest

pytest: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not slow and not gpu and not xla"

# also the slow tests, and live comparison with birder and transformers
test-all: lint types .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,parity]'
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m "not gpu and not xla"
	$(MAKE) test-xla

# torch_xla follows torch with a delay, so it gets an environment of its own: 8 GB; without a TPU it runs on the CPU
.venv-xla/ready: pyproject.toml
	$(PYTHON) -m venv .venv-xla
	.venv-xla/bin/pip install --quiet --disable-pip-version-check "torch==2.9.*" "torchvision==0.24.*" "torch_xla==2.9.*"
	.venv-xla/bin/pip install --quiet --disable-pip-version-check --editable . pytest hypothesis
	touch $@

test-xla: .venv-xla/ready
	PJRT_DEVICE=$${PJRT_DEVICE:-CPU} .venv-xla/bin/pytest -m xla -s tests/test_xla.py

# the oldest release of everything, on Python 3.11 or 3.12, in an environment of its own: 7 GB
.venv-oldest/ready: pyproject.toml tests/lower_bounds.py
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/lower_bounds.py > .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --requirement .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# old releases call what has been deprecated since in what they import, e.g. matplotlib 3.8 in pyparsing 3.3; in the
# environment, for the pytest that a test starts
test-oldest: export PYTEST_ADDOPTS = -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning -W ignore::FutureWarning
test-oldest: .venv-oldest/ready
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n 2 --dist worksteal -m "not slow and not gpu and not xla"

# side by side with what each part is compared to, minutes on one idle core; DATA is a dataset in COCO layout
bench: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(DATA))

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# every page and every docstring, warnings as errors; nothing is loaded from the network, neither here nor by the pages
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# executed in place, with their outputs; images stay below 150 kB
notebooks: .venv/ready
	OMP_NUM_THREADS=1 PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python notebooks/execute.py

clean:
	rm -rf site .venv .venv-oldest .venv-xla runs demo .pytest_cache .mypy_cache .ruff_cache
