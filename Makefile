# Targets: demo, test, fuzz, lint. Each makes .venv on first use; PY names the Python that makes it (3.9 to 3.12).
PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz lint

help:
	@echo "make demo   distil a small network on real photographs and show what came of it"
	@echo "make test   run the tests"
	@echo "make fuzz   try 2,000 random option files and images"
	@echo "make lint   check style and formatting"

# BasicSR's build names torch among its build requirements: an isolated build would fetch a second torch for nothing,
# so torch comes first and the build uses it.
$(STAMP): setup.py constraints.txt
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(PIP) setuptools wheel
	$(PIP) torch torchvision numpy
	$(PIP) --no-build-isolation --use-pep517 basicsr
	$(PIP) --no-build-isolation --use-pep517 -e '.[test,lint,report,onnx]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python -m dckd_sr.demo

# Two processes with one thread each: the fastest way through the tests on two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

# Random option files and images, other ones at every call; tests run a fixed thousand of them.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz.py --cases 2000

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
